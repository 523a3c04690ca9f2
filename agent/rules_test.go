package main

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "tdx-agent"

// bans are imports that must not be, each with its reason. A ban is on what a package
// imports itself, not on what that imports in turn, unless deep is set.
var bans = []struct {
	from, to string // prefixes of import paths; "" is everything of this module
	except   string
	deep     bool
	reason   string
}{
	{from: module + "/measure", to: module + "/remote", reason: "imports run one way: agent, remote, measure"},
	{from: module + "/measure", to: module + "/agent", reason: "imports run one way: agent, remote, measure"},
	{from: module + "/remote", to: module + "/agent", reason: "imports run one way: agent, remote, measure"},
	{from: module + "/measure", to: module + "/measure/tdxsim", except: module + "/measure/tdxsim", reason: "only the program chooses a simulated TD"},
	{from: module + "/measure", to: module + "/measure/image", except: module + "/measure/image", reason: "Reference Values are the Verifier's side"},
	{from: module + "/measure", to: module + "/measure/acpi", except: module + "/measure/image", reason: "only image builds ACPI tables"},
	{from: module + "/measure", to: "net/http", deep: true, reason: "what a TD is can be known without a network"},
	{from: module + "/remote/ratls", to: module + "/remote", reason: "ratls reads and writes certificates; it judges nothing"},
	{from: module + "/remote/dcap", to: "net/http", reason: "the quote engine fetches nothing; package collateral does"},
	{from: module + "/remote/dcap", to: module + "/remote/collateral", reason: "imports run one way: remote, collateral, dcap"},
	{from: module + "/remote/collateral", to: module + "/measure", reason: "collateral is about platforms, not about TDs"},
	{from: module + "/remote/dcap", to: module + "/remote/atls", reason: "imports run one way: atls, remote, dcap"},
	{from: module + "/remote/atls", to: module + "/remote/dcap", reason: "a channel asks the Verifier, never the quote engine"},
	{from: "", to: "github.com/decred", except: module + "/agent/keys", reason: "keys of applications live in one package"},
	{from: "", to: "github.com/spf13/cobra", except: module + "/agent", reason: "the command line is the program's"},
	{from: "", to: "github.com/coreos/go-systemd", except: module + "/agent", reason: "the service is the program's"},
	{from: "", to: "github.com/prometheus", except: module + "/agent", reason: "metrics are the program's"},
	{from: module + "/measure", to: "github.com/BurntSushi/toml", reason: "configuration is read in agent, policies in remote"},
	{from: "", to: "github.com/google/go-tdx-guest/client", deep: true, reason: "it registers a global flag, logs to stdout and leaks configfs entries"},
	{from: "", to: "testing", deep: true, reason: "test code has no place in the program"},
}

type goPackage struct {
	ImportPath, Dir   string
	Imports, Deps     []string
	GoFiles, CgoFiles []string
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,Deps,GoFiles,CgoFiles", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var packages []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); err == io.EOF {
			return packages
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func TestImports(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, ban := range bans {
			if !within(p.ImportPath, ban.from) || ban.except != "" && within(p.ImportPath, ban.except) {
				continue
			}
			imports := p.Imports
			if ban.deep {
				imports = p.Deps
			}
			if i := slices.IndexFunc(imports, func(s string) bool { return within(s, ban.to) }); i >= 0 {
				t.Errorf("%s imports %s: %s", p.ImportPath, imports[i], ban.reason)
			}
		}
		if len(p.CgoFiles) > 0 {
			t.Errorf("%s uses cgo: the program is one static binary", p.ImportPath)
		}
	}
}

func within(path, prefix string) bool {
	return prefix == "" || path == prefix || strings.HasPrefix(path, prefix+"/")
}

// TestDocumented demands a comment on every package and every exported name.
func TestDocumented(t *testing.T) {
	for _, p := range listPackages(t) {
		files := token.NewFileSet()
		documented := false
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(files, filepath.Join(p.Dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			documented = documented || f.Doc != nil
			for _, d := range f.Decls {
				for _, name := range undocumented(d) {
					t.Errorf("%s: %s has no comment", files.Position(d.Pos()), name)
				}
			}
		}
		if !documented {
			t.Errorf("package %s has no comment", p.ImportPath)
		}
	}
}

func undocumented(d ast.Decl) (names []string) {
	switch d := d.(type) {
	case *ast.FuncDecl:
		if d.Doc == nil && d.Name.IsExported() && (d.Recv == nil || exportedReceiver(d.Recv)) && !plainMethod(d.Name.Name) {
			names = append(names, d.Name.Name)
		}
	case *ast.GenDecl:
		for _, s := range d.Specs {
			switch s := s.(type) {
			case *ast.TypeSpec:
				if d.Doc == nil && s.Doc == nil && s.Name.IsExported() {
					names = append(names, s.Name.Name)
				}
			case *ast.ValueSpec:
				for _, n := range s.Names {
					if d.Doc == nil && s.Doc == nil && s.Comment == nil && n.IsExported() {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

// plainMethod names methods whose contract is an interface of the standard library.
func plainMethod(name string) bool {
	return slices.Contains([]string{"Error", "Unwrap", "String"}, name)
}

func exportedReceiver(recv *ast.FieldList) bool {
	t := recv.List[0].Type
	if s, ok := t.(*ast.StarExpr); ok {
		t = s.X
	}
	id, ok := t.(*ast.Ident)
	return ok && id.IsExported()
}

// TestTopLevel holds the repository's top level to the layout. What a user leaves there,
// such as the quote.json of README, is his own.
func TestTopLevel(t *testing.T) {
	allowed := []string{"agent", "measure", "remote", "packaging", "systemd", "go.mod", "go.sum", "agent.toml.example", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", ".ci", ".gitignore"}
	files, err := exec.Command("git", "-C", "..", "ls-files", "-z").Output()
	if err != nil {
		t.Skipf("only git knows what belongs to the repository: %v", err)
	}
	if len(files) == 0 {
		t.Fatal("git knows no file here")
	}
	seen := map[string]bool{}
	for file := range strings.SplitSeq(strings.TrimSuffix(string(files), "\x00"), "\x00") {
		name, _, _ := strings.Cut(file, "/")
		if !seen[name] && !slices.Contains(allowed, name) {
			t.Errorf("%s is not in the layout", name)
		}
		seen[name] = true
	}
}

// TestFormatted runs gofmt's check on every Go file, those outside the module too.
func TestFormatted(t *testing.T) {
	var files []string
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules" || d.Name() == "work") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("gofmt", append([]string{"-l"}, files...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("gofmt would change (%v):\n%s", err, out)
	}
}
