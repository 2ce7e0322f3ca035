// SPDX-License-Identifier: MIT OR Apache-2.0

//! The element's properties, and what follows from them at the start.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use gst::glib;
use gst::prelude::*;

use super::{CudaImport, OnDisconnect, OutputMode};
use crate::capture::{Remote, Target};

/// What the application has set.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub node_id: u32,
    pub target_object: Option<String>,
    pub fd: i32,
    pub render_node: Option<String>,
    pub output_mode: OutputMode,
    /// It was set, be it to its default, and so goes before `buffer_type`.
    pub output_mode_was_set: bool,
    pub cuda_device_id: i32,
    pub cuda_import: CudaImport,
    pub buffer_type: Option<String>,
    pub capture_source: Option<String>,
    pub live: LiveSettings,
}

/// The kinds of memory in which buffers may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub system: bool,
    pub dmabuf: bool,
    pub cuda: bool,
}

impl Wanted {
    /// Whatever there is.
    pub const ALL: Self = Self {
        system: true,
        dmabuf: true,
        cuda: true,
    };

    /// What there is besides CUDA memory.
    pub fn nothing_but_cuda(self) -> bool {
        self.cuda && !self.system && !self.dmabuf
    }
}

/// What may change while playing: looked at for each buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct LiveSettings {
    /// Milliseconds.
    pub keepalive_time: u32,
    pub resend_last: bool,
    /// Milliseconds.
    pub first_frame_timeout: u32,
    pub on_disconnect: OnDisconnect,
    /// Frames per second.
    pub target_fps: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            node_id: 0,
            target_object: None,
            fd: -1,
            render_node: None,
            output_mode: OutputMode::Auto,
            output_mode_was_set: false,
            cuda_device_id: -1,
            cuda_import: CudaImport::Auto,
            buffer_type: None,
            capture_source: Some(CAPTURE_SOURCE.into()),
            live: LiveSettings::default(),
        }
    }
}

impl Default for LiveSettings {
    fn default() -> Self {
        Self {
            keepalive_time: 100,
            resend_last: false,
            first_frame_timeout: 10_000,
            on_disconnect: OnDisconnect::Error,
            target_fps: 0,
        }
    }
}

/// The only value of `capture-source` so far.
const CAPTURE_SOURCE: &str = "pipewire";

impl Settings {
    pub fn properties() -> Vec<glib::ParamSpec> {
        let default = Self::default();
        vec![
            glib::ParamSpecUInt::builder("pipewire-node-id")
                .nick("PipeWire node id")
                .blurb(
                    "Id of the node to capture, from the ScreenCast session \
                     (0 without target-object is an error)",
                )
                .default_value(default.node_id)
                .mutable_ready()
                .build(),
            glib::ParamSpecString::builder("target-object")
                .nick("Target object")
                .blurb("Name (node.name) or serial of the node to capture, instead of its id")
                .default_value(default.target_object.as_deref())
                .mutable_ready()
                .build(),
            glib::ParamSpecInt::builder("pipewire-fd")
                .nick("PipeWire socket")
                .blurb(
                    "Socket connected to PipeWire, from the portal's OpenPipeWireRemote; it is \
                     duplicated (-1 = connect to the daemon that the environment names)",
                )
                .minimum(-1)
                .default_value(default.fd)
                .mutable_ready()
                .build(),
            glib::ParamSpecString::builder("render-node")
                .nick("Render node")
                .blurb(
                    "DRM render node by whose abilities DMA-BUFs are negotiated, and which reads them \
                     (null = the first)",
                )
                .default_value(default.render_node.as_deref())
                .mutable_ready()
                .build(),
            glib::ParamSpecEnum::builder_with_default("output-mode", default.output_mode)
                .nick("Output mode")
                .blurb("Memory in which frames leave; any but auto is strict")
                .mutable_ready()
                .build(),
            glib::ParamSpecInt::builder("cuda-device-id")
                .nick("CUDA device")
                .blurb(
                    "CUDA device whose memory buffers leave in; it must be the GPU of a render node that is \
                     named (-1 = that node's, else that of downstream's context, else the first)",
                )
                .minimum(-1)
                .default_value(default.cuda_device_id)
                .mutable_ready()
                .build(),
            glib::ParamSpecEnum::builder_with_default("cuda-import", default.cuda_import)
                .nick("CUDA import")
                .blurb("How pictures come into CUDA memory; for drivers with which one way is bad")
                .mutable_ready()
                .build(),
            glib::ParamSpecUInt::builder("keepalive-time")
                .nick("Keepalive time")
                .blurb("Resend the last frame after this many milliseconds without one (0 = off)")
                .default_value(default.live.keepalive_time)
                .mutable_playing()
                .build(),
            glib::ParamSpecBoolean::builder("resend-last")
                .nick("Resend last")
                .blurb("Resend the last frame at EOS")
                .default_value(default.live.resend_last)
                .mutable_playing()
                .build(),
            glib::ParamSpecUInt::builder("first-frame-timeout")
                .nick("First frame timeout")
                .blurb("Milliseconds to wait for the first frame before an error (0 = for ever)")
                .default_value(default.live.first_frame_timeout)
                .mutable_playing()
                .build(),
            glib::ParamSpecEnum::builder_with_default("on-disconnect", default.live.on_disconnect)
                .nick("On disconnect")
                .blurb("What it means that the node has vanished")
                .mutable_playing()
                .build(),
            glib::ParamSpecUInt::builder("target-fps")
                .nick("Target framerate")
                .blurb("The most frames per second to let out (0 = as many as come)")
                .default_value(default.live.target_fps)
                .mutable_playing()
                .build(),
            glib::ParamSpecString::builder("buffer-type")
                .nick("Buffer type")
                .blurb(
                    "Deprecated, see output-mode: shm = system; dmabuf = auto without system \
                     memory; dmabuf-passthrough = dmabuf",
                )
                .default_value(default.buffer_type.as_deref())
                .mutable_ready()
                .deprecated()
                .build(),
            glib::ParamSpecString::builder("capture-source")
                .nick("Capture source")
                .blurb("Where frames come from; pipewire is the only source so far")
                .default_value(default.capture_source.as_deref())
                .mutable_ready()
                .build(),
        ]
    }

    /// Stores a property's new value.
    pub fn set(&mut self, value: &glib::Value, pspec: &glib::ParamSpec) {
        fn get<'a, T: glib::value::FromValue<'a>>(value: &'a glib::Value) -> T
        where
            T::Checker: glib::value::ValueTypeChecker,
        {
            value
                .get()
                .unwrap_or_else(|_| unreachable!("GObject has checked the type"))
        }
        match pspec.name() {
            "pipewire-node-id" => self.node_id = get(value),
            "target-object" => self.target_object = get(value),
            "pipewire-fd" => self.fd = get(value),
            "render-node" => self.render_node = get(value),
            "output-mode" => {
                self.output_mode = get(value);
                self.output_mode_was_set = true;
            }
            "cuda-device-id" => self.cuda_device_id = get(value),
            "cuda-import" => self.cuda_import = get(value),
            "keepalive-time" => self.live.keepalive_time = get(value),
            "resend-last" => self.live.resend_last = get(value),
            "first-frame-timeout" => self.live.first_frame_timeout = get(value),
            "on-disconnect" => self.live.on_disconnect = get(value),
            "target-fps" => self.live.target_fps = get(value),
            "buffer-type" => self.buffer_type = get(value),
            "capture-source" => self.capture_source = get(value),
            name => unreachable!("no writable property {name} was installed"),
        }
    }

    /// A property's value.
    pub fn get(&self, pspec: &glib::ParamSpec) -> glib::Value {
        match pspec.name() {
            "pipewire-node-id" => self.node_id.to_value(),
            "target-object" => self.target_object.to_value(),
            "pipewire-fd" => self.fd.to_value(),
            "render-node" => self.render_node.to_value(),
            "output-mode" => self.output_mode.to_value(),
            "cuda-device-id" => self.cuda_device_id.to_value(),
            "cuda-import" => self.cuda_import.to_value(),
            "keepalive-time" => self.live.keepalive_time.to_value(),
            "resend-last" => self.live.resend_last.to_value(),
            "first-frame-timeout" => self.live.first_frame_timeout.to_value(),
            "on-disconnect" => self.live.on_disconnect.to_value(),
            "target-fps" => self.live.target_fps.to_value(),
            "buffer-type" => self.buffer_type.to_value(),
            "capture-source" => self.capture_source.to_value(),
            name => unreachable!("no property {name} was installed"),
        }
    }

    /// Whether what is set can be done by this version. The error says which property cannot,
    /// and what to set instead.
    pub fn check(&self) -> Result<(), String> {
        match self.capture_source.as_deref() {
            None | Some(CAPTURE_SOURCE) => {}
            Some(other) => {
                return Err(format!(
                    "capture-source={other} is not in this version: use {CAPTURE_SOURCE}"
                ));
            }
        }
        self.wanted().map(|_| ())
    }

    /// The memory in which buffers may leave. The error says which property means nothing.
    pub fn wanted(&self) -> Result<Wanted, String> {
        let only = |system, dmabuf, cuda| Wanted {
            system,
            dmabuf,
            cuda,
        };
        let by_type = match self.buffer_type.as_deref() {
            None => None,
            Some("shm") => Some(only(true, false, false)),
            Some("dmabuf" | "dma-buf" | "gpu" | "cuda") => Some(only(false, true, true)),
            Some("dmabuf-passthrough" | "passthrough" | "virtgpu") => {
                Some(only(false, true, false))
            }
            Some(other) => {
                return Err(format!(
                    "buffer-type={other} means nothing: it is shm, dmabuf or dmabuf-passthrough \
                     (deprecated: use output-mode)"
                ));
            }
        };
        if let Some(wanted) = by_type.filter(|_| !self.output_mode_was_set) {
            return Ok(wanted);
        }
        Ok(match self.output_mode {
            OutputMode::Auto => Wanted::ALL,
            OutputMode::System => only(true, false, false),
            OutputMode::DmaBuf => only(false, true, false),
            OutputMode::Cuda => only(false, false, true),
        })
    }

    /// The CUDA device that was asked for.
    pub fn cuda_device(&self) -> Option<u32> {
        u32::try_from(self.cuda_device_id).ok()
    }

    /// The node to capture.
    pub fn target(&self) -> Result<Target, String> {
        match (&self.target_object, self.node_id) {
            (Some(name), _) if !name.is_empty() => Ok(Target::Object(name.clone())),
            (_, 0) => Err(
                "no node to capture: set pipewire-node-id (from the ScreenCast session) or \
                 target-object (a node's name or serial)"
                    .into(),
            ),
            (_, id) => Ok(Target::Id(id)),
        }
    }

    /// The daemon to talk to. A given socket is duplicated: closing ours leaves the
    /// application's open for the next start.
    pub fn remote(&self) -> Result<Remote, String> {
        if self.fd < 0 {
            return Ok(Remote::Default);
        }
        duplicate(self.fd).map(Remote::Socket).map_err(|error| {
            format!(
                "pipewire-fd={} cannot be duplicated: {error} (is it open, and of this process?)",
                self.fd
            )
        })
    }
}

impl LiveSettings {
    /// Time without a frame after which the last one is resent.
    pub fn keepalive(&self) -> Option<Duration> {
        (self.keepalive_time > 0).then(|| Duration::from_millis(self.keepalive_time.into()))
    }

    /// The least time from one frame to the next.
    pub fn min_interval(&self) -> Option<Duration> {
        (self.target_fps > 0).then(|| Duration::from_secs(1) / self.target_fps)
    }
}

fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: The application has promised that the descriptor is open while we are started. If
    // it is not, duplicating it fails with EBADF, and the borrow is not used for anything else.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut Settings)) -> Settings {
        let mut settings = Settings::default();
        change(&mut settings);
        settings
    }

    fn buffer_type(text: &str) -> Settings {
        with(|s| s.buffer_type = Some(text.into()))
    }

    /// System memory, DMA-BUFs, CUDA memory.
    fn wants(settings: &Settings) -> (bool, bool, bool) {
        let wanted = settings.wanted().unwrap();
        (wanted.system, wanted.dmabuf, wanted.cuda)
    }

    #[test]
    fn the_deprecated_buffer_types_keep_their_meaning() {
        assert_eq!(wants(&buffer_type("shm")), (true, false, false));
        for text in ["dmabuf", "dma-buf", "gpu", "cuda"] {
            assert_eq!(wants(&buffer_type(text)), (false, true, true), "{text}");
        }
        for text in ["dmabuf-passthrough", "passthrough", "virtgpu"] {
            assert_eq!(wants(&buffer_type(text)), (false, true, false), "{text}");
        }
        let error = buffer_type("shmm").check().unwrap_err();
        assert!(error.contains("shmm means nothing"), "{error}");
    }

    #[test]
    fn an_output_mode_that_was_set_goes_before_the_buffer_type() {
        let mut settings = buffer_type("dmabuf");
        settings.output_mode_was_set = true;
        assert_eq!(wants(&settings), (true, true, true));
        settings.buffer_type = Some("nonsense".into());
        assert!(settings.check().is_err(), "nonsense stays nonsense");
    }

    #[test]
    fn a_named_mode_is_strict() {
        let wanted = |mode| wants(&with(|s| s.output_mode = mode));
        assert_eq!(wanted(OutputMode::System), (true, false, false));
        assert_eq!(wanted(OutputMode::DmaBuf), (false, true, false));
        assert_eq!(wanted(OutputMode::Cuda), (false, false, true));
        assert_eq!(wanted(OutputMode::Auto), (true, true, true));
    }

    #[test]
    fn only_pipewire_is_captured_from() {
        let error = with(|s| s.capture_source = Some("wayland".into()))
            .check()
            .unwrap_err();
        assert!(error.contains("capture-source=wayland"), "{error}");
        assert!(with(|s| s.capture_source = None).check().is_ok());
    }

    #[test]
    fn a_target_is_needed_and_a_name_goes_before_an_id() {
        assert!(Settings::default().target().is_err());
        assert!(
            with(|s| s.target_object = Some(String::new()))
                .target()
                .is_err()
        );
        assert_eq!(with(|s| s.node_id = 7).target(), Ok(Target::Id(7)));
        let both = with(|s| {
            s.node_id = 7;
            s.target_object = Some("desk".into());
        });
        assert_eq!(both.target(), Ok(Target::Object("desk".into())));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_named() {
        let error = with(|s| s.fd = 1_000_000).remote().unwrap_err();
        assert!(error.contains("pipewire-fd=1000000"), "{error}");
    }
}
