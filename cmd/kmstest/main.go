// Command kmstest runs a loopback AWS KMS, so that the AWS path of kmsfs can be
// tried without an AWS account. It prints the environment that points an AWS
// SDK to it, and the ARNs of keys to use, as lines for a shell; then it runs
// until it is interrupted. It keeps its keys in memory: what they encrypted is
// lost when it ends.
//
//	kmstest > kms.env &
//	set -a; . ./kms.env
//	kmsfs init DIR --key "$KEY1"
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"kmsfs/keys/kmstest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kmstest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out, diagnostics io.Writer) error {
	flags := flag.NewFlagSet("kmstest", flag.ContinueOnError)
	flags.SetOutput(diagnostics)
	listen := flags.String("listen", "127.0.0.1:0", "`address` to listen on")
	regions := flags.String("regions", "us-east-1,eu-west-1", "`list` of regions to create keys in")
	perRegion := flags.Int("keys", 2, "`number` of keys per region")
	latency := flags.Duration("latency", 0, "delay every answer by this `time`, as a real KMS would (5ms to 25ms)")
	rps := flags.Float64("rps", 0, "throttle each region to this many calls a second")
	if err := flags.Parse(args); err != nil {
		return err
	}
	srv, err := kmstest.Start(kmstest.Options{Addr: *listen})
	if err != nil {
		return err
	}
	defer srv.Close()
	if *latency > 0 {
		srv.SetLatency(*latency)
	}
	srv.Throttle(*rps)
	if err := describe(out, srv, strings.Split(*regions, ","), *perRegion); err != nil {
		return err
	}
	<-ctx.Done()
	fmt.Fprintf(diagnostics, "kmstest: stopped after %d calls\n", srv.Count())
	return nil
}

// describe creates the keys and prints a file that a shell can source.
func describe(out io.Writer, srv *kmstest.Server, regions []string, perRegion int) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# A loopback KMS, started %s; its keys are lost when it ends.\n", time.Now().Format(time.DateTime))
	fmt.Fprintf(&b, "unset %s\n", strings.Join(kmstest.Unset, " "))
	for _, kv := range srv.Env(srv.Admin()) {
		name, value, _ := strings.Cut(kv, "=")
		fmt.Fprintf(&b, "%s='%s'\n", name, value)
	}
	n := 0
	for _, region := range regions {
		for range perRegion {
			n++
			fmt.Fprintf(&b, "KEY%d='%s'\n", n, srv.CreateKey(region))
		}
	}
	primary := srv.Create(kmstest.KeySpec{Region: regions[0], MultiRegion: true})
	fmt.Fprintf(&b, "# a multi-Region key\nMRK='%s'\n", primary)
	for _, region := range regions[1:] {
		fmt.Fprintf(&b, "# its replica\nMRK_%s='%s'\n", strings.ReplaceAll(region, "-", "_"), srv.Replicate(primary, region))
	}
	_, err := io.WriteString(out, b.String())
	return err
}
