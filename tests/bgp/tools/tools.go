// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package tools names the programs that tests/bgp/build.sh builds, so that go.sum pins them.
package tools

import (
	_ "github.com/osrg/gobgp/v3/cmd/gobgp"
	_ "github.com/osrg/gobgp/v3/cmd/gobgpd"
)
