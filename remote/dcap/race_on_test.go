//go:build race

package dcap_test

// raceDetector makes exhaustive tests take samples: nothing in them runs at the same
// time but what other tests cover.
const raceDetector = true
