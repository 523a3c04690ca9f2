package image

import (
	"fmt"

	"tdx-agent/measure"
)

// namedLayout is a memory layout with what has it.
type namedLayout struct {
	name   string
	layout Layout
}

func knownLayouts() []namedLayout {
	return []namedLayout{
		{"dstack 0.5 and later", DstackLayout05()},
		{"dstack 0.3 and 0.4", DstackLayout03()},
	}
}

// layouts are those to try: the image's, else all that are known.
func (e *explainer) layouts() []namedLayout {
	if e.in.Image != nil {
		return []namedLayout{{"", e.in.Image.Layout}}
	}
	return knownLayouts()
}

// judgeMemory judges the TD HOB, which depends on the size of memory and the firmware's
// layout only, and finds out what size the log's is of.
func (e *explainer) judgeMemory() {
	var got measure.Digest
	for _, ev := range e.log[0] {
		if ev.Type == typeHandoffTables2 {
			got = ev.Digest
			break
		}
	}
	if m := e.in.Machine; m != nil {
		for _, l := range e.layouts() {
			if d, err := l.layout.tdHOBDigest(m.MemoryBytes); err == nil && d == got {
				e.out.Memory, e.out.Layout = m.MemoryBytes, l.name
				e.hob = func(measure.Digest) judgement { return judgement{verdict: Match, hint: layoutHint(l)} }
				return
			}
		}
	}
	memory, l := searchMemory(got, e.layouts())
	e.out.Memory, e.out.Layout = memory, l.name
	e.hob = func(measure.Digest) judgement { return e.hobJudgement(memory, l) }
}

func layoutHint(l namedLayout) string {
	if l.name == "" {
		return ""
	}
	return "memory layout of the firmware of " + l.name
}

func (e *explainer) hobJudgement(memory uint64, l namedLayout) judgement {
	m := e.in.Machine
	switch {
	case m == nil && memory != 0:
		return judgement{verdict: Match, hint: fmt.Sprintf("fits %d MiB; no configuration was given. %s", memory>>20, layoutHint(l))}
	case m == nil && e.in.Image == nil:
		return judgement{verdict: NeedsImage, hint: "no size of memory fits with a known firmware layout"}
	case m == nil:
		return judgement{verdict: Opaque, hint: "no size of memory was found to fit the firmware's layout"}
	case memory == 0 && e.in.Image == nil:
		return judgement{verdict: NeedsImage, hint: fmt.Sprintf("%d MiB fits no known firmware layout, nor does another size", m.MemoryBytes>>20)}
	}
	want, err := e.layouts()[0].layout.tdHOBDigest(m.MemoryBytes)
	if err != nil {
		return judgement{verdict: Opaque, hint: err.Error()}
	}
	if memory == 0 {
		return judgement{Mismatch, &want, "the firmware file, whose memory layout is another, or memory"}
	}
	return judgement{Mismatch, &want, fmt.Sprintf("memory: the log fits %d MiB, configured are %d MiB", memory>>20, m.MemoryBytes>>20)}
}

// searchMemory tries the sizes of memory that machines have: whole MiB, then coarser.
func searchMemory(want measure.Digest, layouts []namedLayout) (uint64, namedLayout) {
	if want.IsZero() { // the log has no TD HOB
		return 0, namedLayout{}
	}
	for _, l := range layouts {
		for _, part := range []struct{ to, step uint64 }{{16 << 30, 1 << 20}, {256 << 30, 64 << 20}, {8 << 40, 1 << 30}} {
			for memory := part.step; memory <= part.to; memory += part.step {
				if d, err := l.layout.tdHOBDigest(memory); err == nil && d == want {
					return memory, l
				}
			}
		}
	}
	return 0, namedLayout{}
}
