// Package audit keeps the record of what callers of the agent have asked for: one line of
// JSON for each call that takes a key, a quote or an event, answered or not.
//
// Every line holds the SHA-256 of the line before it, so that nothing can be changed,
// taken out or put in without breaking the chain. Whoever can write the file can also
// write another chain; that it is another shows in the last line's hash, the head, which
// the agent keeps in memory, shows in its status, and logs when it starts and stops.
//
// The record is for people who look for what has happened, and leaves the machine with
// them. So it holds who, what, when and with which result, and never a key, report data
// or signed data: of a request it has an HMAC, under a key that stays in the file
// audit.key. Who has that key can tell whether a known request is the one of a line, and
// who has not learns only which requests were the same.
//
// The files are audit.jsonl and, once that has reached its limit, audit.1.jsonl before
// it; what is older is dropped, and the chain goes on.
package audit
