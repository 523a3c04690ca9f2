//go:build !race

package dcap_test

const raceDetector = false
