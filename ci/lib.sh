# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=bash
# What the scripts in this folder share. Source it; it changes to the repository's root.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Nothing here asks questions: not apt, not cargo, not git.
export DEBIAN_FRONTEND=noninteractive
# rustup's installer puts cargo here. A new enough one that is on PATH already wins.
CARGO_BIN=${CARGO_HOME:-$HOME/.cargo}/bin
export PATH="$PATH:$CARGO_BIN"
# The scripts with GObject bindings need the distribution's Python, not one from pyenv or conda.
export PYTHON=/usr/bin/python3

# The oldest Rust that builds this, as in Cargo.toml's rust-version.
RUST_MINIMUM=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

say() { printf '\n== %s\n' "$*"; }
fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Run a command as root: directly, or through sudo where we are somebody else.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        # sudo clears the environment.
        sudo env DEBIAN_FRONTEND=noninteractive "$@"
    else
        fail "need root for: $* (no sudo here)"
    fi
}

# at_least 1.92 1.95.0: true when the second version is not older than the first.
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

have_rust() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d ' ' -f 2) && [ -n "$version" ] &&
        at_least "$RUST_MINIMUM" "$version"
}

# Make a new enough cargo the one that is called, if there is one. Asked again after an installation.
find_rust() {
    have_rust && return
    hash -r
    PATH="$CARGO_BIN:$PATH"
    have_rust && return
    # The user's default toolchain may be older, and stays what it is.
    ! command -v rustup >/dev/null || export RUSTUP_TOOLCHAIN=stable
    have_rust
}
find_rust || true

# The folder where GStreamer looks for exactly our plugins and nothing else of target/.
# plugin_dir PROFILE: makes target/PROFILE/gstreamer-1.0 with links to each plugin built there.
plugin_dir() {
    local dir="target/$1/gstreamer-1.0" library
    mkdir -p "$dir"
    rm -f "$dir"/*.so
    for library in target/"$1"/libgst*.so; do
        [ -e "$library" ] || fail "no plugin in target/$1: was it built?"
        ln -s "../${library##*/}" "$dir/"
    done
    printf '%s\n' "$PWD/$dir"
}

# The cargo options for the GStreamer of this machine; a build script cannot switch features on.
gst_features() {
    if pkg-config --atleast-version=1.24 gstreamer-1.0; then
        echo --features v1_24
    fi
}

# The plugins and helix-host in release mode, as ci/demo runs them.
build_release() {
    say "Building the plugins and helix-host (release)"
    # shellcheck disable=SC2046
    cargo build --release --locked $(gst_features) -p gst-plugin-pipewirezerocopy \
        -p gst-plugin-qemudisplay -p gst-plugin-scanout -p gst-plugin-vsock -p helix-host
}
