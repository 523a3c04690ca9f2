package atls

// Transcript is the hash of both hello frames.
var Transcript = transcript
