package volume

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// StoredPath says where an entry of this directory lies now, or would lie: the
// stored names from the root down to it, with "/" between them, as no key is
// needed to follow them. Nothing holds it there: a directory on the way may be
// renamed at any time, and then the path leads nowhere, or to something else. That
// is true of a directory that was removed, too.
func (d *Dir) StoredPath(name string) (string, error) {
	stored, err := d.existing(name)
	if err != nil || d.root {
		return stored, err
	}
	// The kernel knows the way from the root of all to both, whatever was renamed
	// since they were opened; an ancestor of the volume's root too.
	dir, err := pathOf(d.fd)
	if err != nil {
		return "", err
	}
	root, err := pathOf(d.v.root)
	if err != nil {
		return "", err
	}
	below, inside := strings.CutPrefix(dir, strings.TrimSuffix(root, "/")+"/")
	if !inside {
		return "", fmt.Errorf("%q does not lie below %q", dir, root)
	}
	return below + "/" + stored, nil
}

// pathOf is the path of an open directory; ENAMETOOLONG if it is longer than a
// page.
func pathOf(fd int) (string, error) {
	path, err := readlinkat(unix.AT_FDCWD, procPath(fd))
	return string(path), err
}
