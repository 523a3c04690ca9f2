package keys

// ReservedPath tells whether a path is that of the key [App.Sign] signs with: whoever
// may derive it can sign for the whole application.
func ReservedPath(path string) bool { return path == signPath }

// ReservedPurpose tells whether a purpose is that of the key [App.Sign] signs with. A
// chain does not name the path: any key with a chain of this purpose looks like it.
func ReservedPurpose(purpose string) bool { return purpose == signPurpose }
