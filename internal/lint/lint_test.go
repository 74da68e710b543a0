package lint

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "kmsfs"

// A room is a directory of the repository and the packages beneath it.
type room struct {
	may   []string // import prefixes beyond the standard library, golang.org/x and itself
	never []string // import prefixes it must not reach, not even through others
}

const (
	goFUSE = "github.com/hanwen/go-fuse"
	aws    = "github.com/aws"
	toml   = "github.com/pelletier/go-toml"
	tink   = "github.com/tink-crypto/tink-go"
)

// rooms is the table of ARCHITECTURE.md. cmd and integration introduce the
// others to one another and may import everything.
var rooms = map[string]room{
	"crypt":   {may: []string{tink}, never: []string{goFUSE, aws, toml, "log/slog", module + "/"}},
	"config":  {may: []string{toml, module + "/internal"}, never: []string{goFUSE, aws, module + "/"}},
	"volume":  {may: []string{module + "/crypt", module + "/internal", toml}, never: []string{goFUSE, aws, module + "/keys", module + "/fs"}},
	"keys":    {may: []string{module + "/crypt", module + "/internal", aws}, never: []string{goFUSE, module + "/volume", module + "/fs"}},
	"fs":      {may: []string{module + "/crypt", module + "/volume", module + "/internal", goFUSE}, never: []string{aws, module + "/keys", module + "/config"}},
	"rekey":   {may: []string{module + "/crypt", module + "/volume", module + "/internal"}, never: []string{goFUSE, aws, module + "/keys", module + "/fs"}},
	"headers": {may: []string{module + "/crypt", module + "/volume", module + "/internal"}, never: []string{goFUSE, aws, module + "/keys", module + "/fs"}},
	"fsck":    {may: []string{module + "/crypt", module + "/volume", module + "/internal"}, never: []string{goFUSE, aws, module + "/keys", module + "/fs"}},
}

type pkg struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Deps       []string
}

// TestImportDirections keeps the rooms apart. Test files are free: a test of
// keys may well mount.
func TestImportDirections(t *testing.T) {
	pkgs := list(t, "./...")
	require.NotEmpty(t, pkgs)
	std := standard(t)
	seen := map[string]bool{}
	for _, p := range pkgs {
		name, r, ok := roomOf(p.ImportPath)
		if !ok {
			continue
		}
		seen[name] = true
		for _, imp := range p.Imports {
			if !std[imp] && !r.mayImport(name, imp) {
				t.Errorf("%s imports %s: the room %q may import only itself, golang.org/x and %v", p.ImportPath, imp, name, r.may)
			}
		}
		for _, dep := range p.Deps {
			if r.reaches(name, dep) {
				t.Errorf("%s reaches %s (go list -deps shows how): the room %q must never", p.ImportPath, dep, name)
			}
		}
	}
	require.True(t, seen["crypt"], "go list did not list the room crypt: this test looks at nothing")
}

// TestTableRefuses shows that the table would catch what it is for.
func TestTableRefuses(t *testing.T) {
	require.False(t, rooms["crypt"].mayImport("crypt", goFUSE+"/v2/fs"))
	require.False(t, rooms["fs"].mayImport("fs", module+"/keys"))
	require.True(t, rooms["fs"].mayImport("fs", module+"/volume"))
	require.True(t, rooms["crypt"].reaches("crypt", module+"/volume"))
	require.False(t, rooms["crypt"].reaches("crypt", module+"/crypt"))
	require.False(t, rooms["config"].reaches("config", module+"/internal/durable"))
	require.False(t, under(module+"/fsck", module+"/fs"), "a prefix ends at a slash")
}

func roomOf(importPath string) (string, room, bool) {
	rest, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return "", room{}, false
	}
	name, _, _ := strings.Cut(rest, "/")
	r, ok := rooms[name]
	return name, r, ok
}

func (r room) mayImport(name, imp string) bool {
	return under(imp, module+"/"+name) || under(imp, "golang.org/x") ||
		slices.ContainsFunc(r.may, func(p string) bool { return under(imp, p) })
}

func (r room) reaches(name, dep string) bool {
	if under(dep, module+"/"+name) || under(dep, module+"/internal") {
		return false
	}
	return slices.ContainsFunc(r.never, func(p string) bool { return under(dep, p) })
}

// under reports whether the import path p is prefix or lies beneath it.
func under(p, prefix string) bool {
	prefix = strings.TrimSuffix(prefix, "/")
	return p == prefix || strings.HasPrefix(p, prefix+"/")
}

// TestAliases keeps the two packages whose own names mean something else here
// under one name everywhere.
func TestAliases(t *testing.T) {
	want := map[string]string{
		goFUSE + "/v2/fs":                  "fusefs",
		aws + "/aws-sdk-go-v2/service/kms": "awskms",
	}
	each(t, func(path string, f *ast.File, _ []byte) {
		for _, imp := range f.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			require.NoError(t, err)
			alias := want[p]
			if alias == "" || imp.Name != nil && (imp.Name.Name == alias || imp.Name.Name == "_") {
				continue
			}
			t.Errorf("%s imports %s: name it %s, as everywhere", path, p, alias)
		}
	})
}

// TestPackageNames refuses the names under which unrelated things gather.
func TestPackageNames(t *testing.T) {
	each(t, func(path string, f *ast.File, _ []byte) {
		if slices.Contains([]string{"util", "utils", "common", "types", "models", "pkg", "helpers", "misc"}, f.Name.Name) {
			t.Errorf("%s: package %s says nothing about its contents", path, f.Name.Name)
		}
	})
}

// TestFormatted is gofmt -l.
func TestFormatted(t *testing.T) {
	files := 0
	each(t, func(path string, _ *ast.File, src []byte) {
		files++
		formatted, err := format.Source(src)
		if err != nil || !bytes.Equal(src, formatted) {
			t.Errorf("%s is not formatted: run gofmt -w %s", path, path)
		}
	})
	require.NotZero(t, files)
}

// TestFuzzTargetsHaveSeeds: without seeds a fuzz target run by "go test" tests
// nothing at all, and says ok.
func TestFuzzTargetsHaveSeeds(t *testing.T) {
	each(t, func(path string, f *ast.File, src []byte) {
		if !strings.HasSuffix(path, "_test.go") {
			return
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Fuzz") || len(fn.Type.Params.List) != 1 {
				continue
			}
			seeds, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "testdata", "fuzz", fn.Name.Name, "*"))
			if len(seeds) == 0 && !adds(fn) {
				t.Errorf("%s: %s has no seed: add one by f.Add or under testdata/fuzz/%s", path, fn.Name.Name, fn.Name.Name)
			}
		}
	})
}

// adds reports whether the fuzz function calls Add on its parameter.
func adds(fn *ast.FuncDecl) (found bool) {
	names := fn.Type.Params.List[0].Names
	if len(names) == 0 || fn.Body == nil {
		return false
	}
	ast.Inspect(fn.Body, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Add" {
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == names[0].Name {
				found = true
			}
		}
		return !found
	})
	return found
}

// each calls f for every Go file of the repository.
func each(t *testing.T, f func(path string, file *ast.File, src []byte)) {
	t.Helper()
	fset := token.NewFileSet()
	err := filepath.WalkDir(top(t), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(fset, path, src, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		f(path, file, src)
		return nil
	})
	require.NoError(t, err)
}

// top is the root of the repository.
func top(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	require.NoError(t, err)
	return filepath.Dir(strings.TrimSpace(string(out)))
}

// list asks the go command for packages, test files aside.
func list(t *testing.T, patterns ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Standard,Imports,Deps"}, patterns...)...)
	cmd.Dir, cmd.Stderr = top(t), os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err)
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := dec.Decode(&p)
		if err == io.EOF {
			return pkgs
		}
		require.NoError(t, err)
		pkgs = append(pkgs, p)
	}
}

func standard(t *testing.T) map[string]bool {
	t.Helper()
	std := map[string]bool{"C": true}
	for _, p := range list(t, "std") {
		std[p.ImportPath] = true
	}
	return std
}
