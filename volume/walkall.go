package volume

import "context"

// WalkAll is Walk that also calls visitDir for every directory below the root,
// before what is in it. path is as in Item; fd is the directory's O_PATH
// descriptor and stays the walk's. A directory that can't be entered is reported
// to visit only.
func (v *Volume) WalkAll(ctx context.Context, visit func(*Item) error, visitDir func(path string, fd int) error) error {
	w := &walker{v: v, visit: visit}
	defer w.close()
	if err := w.enterRoot(); err != nil {
		return err
	}
	for len(w.stack) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		depth := len(w.stack)
		if err := w.step(); err != nil {
			return err
		}
		if len(w.stack) > depth { // the step went down
			f := w.top()
			if err := visitDir(f.at.path(""), f.dir.fd); err != nil {
				return err
			}
		}
	}
	return nil
}
