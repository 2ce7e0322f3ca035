// SPDX-License-Identifier: MIT OR Apache-2.0

//! The plugin on machines that lack what CUDA memory needs, whatever this one has: in processes of their
//! own, for which the libraries are hidden behind empty files.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// All that is loaded at run time.
const LIBRARIES: [&str; 5] = [
    "libcuda.so.1",
    "libgstcuda-1.0.so.0",
    "libEGL.so.1",
    "libGLESv2.so.2",
    "libgbm.so.1",
];

/// A machine without some libraries.
struct Machine {
    libraries: TempDir,
    plugins: TempDir,
}

/// What cargo has built beside this test.
fn built(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().with_file_name(name);
    assert!(path.exists(), "{}", path.display());
    path
}

impl Machine {
    fn without(missing: &[&str]) -> Self {
        let machine = Self {
            libraries: tempfile::tempdir().unwrap(),
            plugins: tempfile::tempdir().unwrap(),
        };
        for library in missing {
            fs::write(machine.libraries.path().join(library), "").unwrap();
        }
        let plugin = "libgstpipewirezerocopy.so";
        symlink(built(plugin), machine.plugins.path().join(plugin)).unwrap();
        machine
    }

    /// With a driver that only looks like one (tests/cuda-fake).
    fn with_driver(self) -> Self {
        let driver = self.libraries.path().join("libcuda.so.1");
        symlink(built("libzerocopy_cuda_fake.so"), driver).unwrap();
        self
    }

    /// What a program there says, of all kinds.
    fn says(&self, program: &str, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(program)
            .args(arguments)
            .env("LD_LIBRARY_PATH", self.libraries.path())
            .env("GST_PLUGIN_PATH", self.plugins.path())
            // No other plugin is wanted, nor what this machine remembers of them.
            .env("GST_PLUGIN_SYSTEM_PATH", "")
            .env("GST_REGISTRY", self.plugins.path().join("registry"))
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    /// The error of `output-mode=cuda`.
    fn error(&self) -> String {
        let element = "pipewirezerocopysrc";
        let settings = ["pipewire-node-id=42", "output-mode=cuda"];
        let (worked, said) = self.says("gst-launch-1.0", &[&[element], &settings[..]].concat());
        assert!(!worked, "{said}");
        assert!(
            said.contains("output-mode=cuda cannot be had here"),
            "{said}"
        );
        said
    }
}

/// Whether this GStreamer is new enough to look for more than its own version.
fn has_cuda_memory() -> bool {
    gst::init().unwrap();
    let (major, minor, ..) = gst::version();
    (major, minor) >= (1, 24)
}

/// The reason must be that, or a GStreamer that is too old for anything else to matter.
fn names(error: &str, library: &str) {
    if has_cuda_memory() {
        assert!(error.contains(library), "{error}");
    } else {
        assert!(error.contains("and CUDA memory needs 1.24"), "{error}");
    }
}

#[test]
fn the_plugin_loads_and_registers_where_all_are_missing() {
    let machine = Machine::without(&LIBRARIES);
    let (worked, said) = machine.says("gst-inspect-1.0", &["pipewirezerocopysrc"]);
    assert!(worked, "{said}");
    assert!(said.contains("libgstpipewirezerocopy.so"), "{said}");
    names(&machine.error(), "libcuda.so.1 cannot be loaded");
}

#[test]
fn each_library_that_is_missing_is_named() {
    let machine = Machine::without(&["libgstcuda-1.0.so.0"]).with_driver();
    names(&machine.error(), "libgstcuda-1.0.so.0 cannot be loaded");
    // Debian's libgstcuda wants it too, and comes first.
    let machine = Machine::without(&["libEGL.so.1"]).with_driver();
    names(&machine.error(), "libEGL.so.1: file too short");
}

#[test]
fn what_cuda_lacks_here_is_named_and_stays_so() {
    gst::init().unwrap();
    let Err(error) = gstpipewirezerocopy::cuda::available() else {
        println!("this machine has all that CUDA memory needs: nothing is missing here");
        return;
    };
    let gstpipewirezerocopy::cuda::Error::Unavailable(text) = &error else {
        panic!("{error:?}");
    };
    let named = [
        "libcuda.so.1 ",
        "libgstcuda-1.0.so.0 ",
        "libEGL.so.1 ",
        "GStreamer 1.",
    ];
    assert!(named.iter().any(|name| text.contains(name)), "{text}");
    assert_eq!(gstpipewirezerocopy::cuda::available(), Err(error));
}
