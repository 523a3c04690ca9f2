package atls

// Transcript is the hash of both hello frames.
var Transcript = transcript

// ClientOf is what the limits per address count by.
var ClientOf = clientOf
