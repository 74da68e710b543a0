package main

import (
	"fmt"
	"math"
	"strings"

	"kmsfs/integration/peers"
)

// Measures of the plot, in pixels.
const (
	plotLabels = 190
	plotWidth  = 560
	plotBar    = 9
	plotRow    = 2*plotBar + 10
	plotTop    = 46
)

// Ratios shown lie between these; what is beyond is drawn to the edge, with its number.
const (
	plotLeast = 0.01
	plotMost  = 10
)

// plot draws the time of kmsfs and of gocryptfs as multiples of the loopback's, on a
// logarithmic scale: bars go from the loopback's line to the left where a file system
// is faster and to the right where it is slower.
func (p *report) plot() string {
	steps := p.beside.measured()
	height := plotTop + len(steps)*plotRow + 24
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", plotLabels+plotWidth+70, height)
	fmt.Fprint(&b, `<rect width="100%" height="100%" fill="white"/>`+"\n")
	fmt.Fprint(&b, `<text x="8" y="16" font-size="13">Time as a multiple of the go-fuse loopback's (logarithmic; left is faster)</text>`+"\n")
	fmt.Fprint(&b, `<rect x="8" y="24" width="10" height="10" fill="#1f6fb4"/><text x="22" y="33">kmsfs</text><rect x="80" y="24" width="10" height="10" fill="#d98b2b"/><text x="94" y="33">gocryptfs</text>`+"\n")
	for at := plotLeast; at < plotMost*1.01; at *= 10 {
		fmt.Fprintf(&b, `<line x1="%[1]d" x2="%[1]d" y1="%[2]d" y2="%[3]d" stroke="#ddd"/><text x="%[1]d" y="%[4]d" text-anchor="middle">%[5]g</text>`+"\n", plotX(at), plotTop-4, height-20, height-6, at)
	}
	for i, s := range steps {
		y := plotTop + i*plotRow
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", plotLabels-8, y+plotBar+4, s.name)
		p.bar(&b, s.name, peers.Kmsfs.Short, y, "#1f6fb4")
		p.bar(&b, s.name, p.rival, y+plotBar+1, "#d98b2b")
	}
	fmt.Fprintf(&b, `<line x1="%[1]d" x2="%[1]d" y1="%[2]d" y2="%[3]d" stroke="#555"/>`+"\n</svg>\n", plotX(1), plotTop-4, height-20)
	return b.String()
}

func (p *report) bar(b *strings.Builder, step, short string, y int, colour string) {
	list := p.beside.ratios(step, short, peers.Loopback.Short)
	if len(list) == 0 {
		return
	}
	r := middle(list)
	from, to := plotX(1), plotX(r)
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%d" height="%d" fill="%s"/>`, min(from, to), y, max(from, to)-min(from, to), plotBar, colour)
	fmt.Fprintf(b, `<text x="%d" y="%d" font-size="9">%.2f</text>`+"\n", max(from, to)+3, y+plotBar-1, r)
}

func plotX(ratio float64) int {
	ratio = min(max(ratio, plotLeast), plotMost)
	return plotLabels + int(plotWidth*math.Log(ratio/plotLeast)/math.Log(plotMost/plotLeast))
}
