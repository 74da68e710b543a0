package fsck

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	"kmsfs/volume"
)

// maxPlaces bounds the places of ids that stand more than once.
const maxPlaces = 1 << 16

// twins tells which files, and which directories, have an id that stands on another
// one too. The places are found by a walk of their own, which is only needed if there
// are any; what is gone by then is not told.
func (j *job) twins(ctx context.Context) error {
	ids, err := j.ids.twins()
	if err != nil || len(ids) == 0 {
		return err
	}
	places, total := map[twinID][]Finding{}, 0
	inodes := map[twinID]map[uint64]bool{}
	err = j.v.Scan(ctx, func(it *volume.Item) error {
		id, ok := j.idOf(it)
		if !ok || !ids[id] || inodes[id][it.Ino] || total >= maxPlaces {
			return nil
		}
		if inodes[id] == nil {
			inodes[id] = map[uint64]bool{}
		}
		inodes[id][it.Ino] = true
		places[id] = append(places[id], j.twin(it, id))
		total++
		return nil
	})
	for _, list := range places {
		if len(list) < 2 {
			continue
		}
		for _, f := range list {
			j.tell(f)
		}
	}
	return err
}

func (j *job) twin(it *volume.Item, id twinID) Finding {
	if id[0] == kindDir {
		return j.finding(it, TwinDir, Damage, errors.New("another directory has the same id: on a mount, the names in one of the two can't be read"))
	}
	return j.finding(it, TwinFile, Damage, errors.New("another file has the same id and data key: one of the two was copied in the backing directory"))
}

// idOf reads the id of a file with contents, or of a directory.
func (j *job) idOf(it *volume.Item) (id twinID, ok bool) {
	if it.Err != nil || it.Type != unix.DT_REG && it.Type != unix.DT_DIR {
		return id, false
	}
	fd, st, err := it.OpenPath()
	if err != nil {
		return id, false
	}
	defer unix.Close(fd)
	if it.Type == unix.DT_DIR {
		raw, err := volume.PeekDirID(fd)
		if err != nil || len(raw) != volume.DirXattrSize {
			return id, false
		}
		id[0] = kindDir
		copy(id[1:], raw)
		return id, true
	}
	raw, err := volume.ReadHeader(fd)
	if err != nil || st.Size == 0 {
		return id, false
	}
	h, err := j.v.ParseHeader(raw)
	if err != nil {
		return id, false
	}
	id[0] = kindFile
	copy(id[1:], h.File[:])
	return id, true
}
