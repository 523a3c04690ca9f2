//! Exercises dstack's published Rust SDK against the agent whose sockets are named by
//! DSTACK_SIMULATOR_ENDPOINT and TAPPD_SIMULATOR_ENDPOINT. Ends with the line
//! "N passed, N failed" and status 1 if anything failed. Every method of the SDK is
//! called.
use std::error::Error;
use std::future::Future;

use dstack_sdk::dstack_client::{DstackClient, TlsKeyConfig};
use dstack_sdk::ethereum::to_account;
use dstack_sdk::tappd_client::TappdClient;

type Outcome = Result<(), Box<dyn Error>>;

/// Fails with the expression unless it is true.
macro_rules! ensure {
    ($e:expr) => {
        if !$e {
            return Err(concat!(stringify!($e), " is false").into());
        }
    };
}

struct Tally {
    passed: usize,
    failed: usize,
}

impl Tally {
    async fn test(&mut self, name: &str, body: impl Future<Output = Outcome>) {
        match body.await {
            Ok(()) => {
                self.passed += 1;
                println!("ok        {name}");
            }
            Err(error) => {
                self.failed += 1;
                println!("FAILED    {name}: {error}");
            }
        }
    }
}

/// The registers of a quote as hexadecimal (TDX DCAP, version 4 layout).
fn rtmr(quote: &[u8], i: usize) -> String {
    hex::encode(&quote[376 + 48 * i..424 + 48 * i])
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let dstack = DstackClient::new(None);
    let tappd = TappdClient::new(None);
    let mut t = Tally { passed: 0, failed: 0 };

    t.test("get_key", async {
        let one = dstack.get_key(Some("/a".into()), Some("p".into())).await?;
        let two = dstack.get_key(Some("/a".into()), Some("q".into())).await?;
        let other = dstack.get_key(None, None).await?;
        ensure!(one.decode_key()?.len() == 32);
        ensure!(one.key == two.key && one.key != other.key);
        ensure!(one.signature_chain.len() == 2 && one.decode_signature_chain()?[0].len() == 65);
        ensure!(one.signature_chain[0] != two.signature_chain[0]);
        to_account(&one)?;
        Ok(())
    })
    .await;

    t.test("get_quote", async {
        let q = dstack.get_quote(vec![1, 2, 3]).await?;
        let raw = q.decode_quote()?;
        ensure!(raw[568..571] == [1, 2, 3] && raw[571..632].iter().all(|b| *b == 0));
        let replayed = q.replay_rtmrs()?;
        for i in 0..4 {
            ensure!(replayed[&(i as u8)] == rtmr(&raw, i));
        }
        ensure!(q.decode_event_log()?.iter().all(|e| e.digest.len() == 96));
        ensure!(q.report_data.len() == 128);
        ensure!(dstack.get_quote(vec![]).await.is_err());
        ensure!(dstack.get_quote(vec![0; 65]).await.is_err());
        Ok(())
    })
    .await;

    t.test("attest", async {
        let a = dstack.attest(b"test".to_vec()).await?.decode_attestation()?;
        ensure!(a.len() > 1000 && a[0] == 0);
        Ok(())
    })
    .await;

    t.test("info", async {
        let info = dstack.info().await?;
        ensure!(info.app_id.len() == 40 && info.compose_hash.len() == 64);
        ensure!(info.tcb_info.compose_hash == info.compose_hash && !info.tcb_info.app_compose.is_empty());
        ensure!(!info.tcb_info.event_log.is_empty());
        Ok(())
    })
    .await;

    t.test("version", async {
        let v = dstack.version().await?;
        ensure!(!v.version.is_empty() && !v.rev.is_empty());
        Ok(())
    })
    .await;

    t.test("emit_event", async {
        dstack.emit_event("rust-sdk".into(), b"payload".to_vec()).await?;
        let q = dstack.get_quote(vec![7]).await?;
        let event = q.decode_event_log()?.into_iter().find(|e| e.event == "rust-sdk");
        ensure!(event.is_some_and(|e| e.event_payload == hex::encode("payload")));
        ensure!(q.replay_rtmrs()?[&3] == rtmr(&q.decode_quote()?, 3));
        ensure!(dstack.emit_event(String::new(), vec![]).await.is_err());
        Ok(())
    })
    .await;

    t.test("get_tls_key", async {
        let config = TlsKeyConfig::builder().subject("rust").alt_names(vec!["localhost".into()]).usage_ra_tls(true).usage_server_auth(true).build();
        let one = dstack.get_tls_key(config).await?;
        let two = dstack.get_tls_key(TlsKeyConfig::builder().build()).await?;
        ensure!(one.key.starts_with("-----BEGIN PRIVATE KEY-----\n") && one.key != two.key);
        ensure!(one.certificate_chain.len() == 2 && one.certificate_chain[0].starts_with("-----BEGIN CERTIFICATE-----\n"));
        Ok(())
    })
    .await;

    t.test("sign and verify", async {
        for algorithm in ["ed25519", "secp256k1", "secp256k1_prehashed"] {
            let data = vec![9; 32];
            let s = dstack.sign(algorithm, data.clone()).await?;
            ensure!(s.decode_signature()?.len() == 64 && s.decode_signature_chain()?.len() == 3);
            ensure!(dstack.verify(algorithm, data, s.decode_signature()?, s.decode_public_key()?).await?.valid);
            ensure!(!dstack.verify(algorithm, vec![8; 32], s.decode_signature()?, s.decode_public_key()?).await?.valid);
        }
        ensure!(dstack.sign("secp256k1_prehashed", vec![1]).await.is_err());
        Ok(())
    })
    .await;

    t.test("tappd derive_key", async {
        let one = tappd.derive_key("/a").await?;
        let two = tappd.derive_key_with_subject("/a", "other").await?;
        let three = tappd.derive_key_with_subject_and_alt_names("/b", Some("s"), Some(vec!["localhost".into()])).await?;
        ensure!(one.decode_key()?.len() == 32);
        ensure!(one.key == two.key && one.key != three.key && one.certificate_chain.len() == 2);
        Ok(())
    })
    .await;

    t.test("tappd get_quote", async {
        let q = tappd.get_quote(vec![5; 64]).await?;
        let raw = q.decode_quote()?;
        ensure!(raw[568..632] == [5; 64]);
        ensure!(q.replay_rtmrs()?[&3] == rtmr(&raw, 3) && !q.decode_event_log()?.is_empty());
        ensure!(tappd.get_quote(vec![5; 63]).await.is_err());
        Ok(())
    })
    .await;

    t.test("tappd info", async {
        let info = tappd.info().await?;
        ensure!(info.app_id.len() == 40 && !info.tcb_info.event_log.is_empty());
        Ok(())
    })
    .await;

    println!("{} passed, {} failed", t.passed, t.failed);
    std::process::exit((t.failed > 0) as i32);
}
