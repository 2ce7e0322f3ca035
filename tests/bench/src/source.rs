// SPDX-License-Identifier: MIT OR Apache-2.0

//! A source that costs next to nothing: the same few pictures again and again, from where they
//! lie, with no queue before the element.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gst::glib;
use gst_base::prelude::*;

use crate::case::{Case, Format, Pace};
use crate::meter::Meter;
use crate::plain::Plain;

/// More than are open at once.
pub const PICTURES: usize = 4;

/// Frames a second, of [`Pace::Paced`] and of the caps.
pub const RATE: u32 = 60;

/// Frames that the element carries before the bare socket carries as many: a second's. Each has its 60 frames a
/// second that way, and both meet the same machine.
const TURN: u32 = RATE;

/// Longer than any frame takes: what is stuck is noticed.
pub const STUCK: Duration = Duration::from_mins(1);

glib::wrapper! {
    pub struct BenchSrc(ObjectSubclass<imp::BenchSrc>)
        @extends gst_base::PushSrc, gst_base::BaseSrc, gst::Element, gst::Object;
}

/// A bare socket that takes turns with the element, in the source's own thread.
pub struct Neighbour {
    pub plain: Plain,
    pub meter: Arc<Meter>,
}

impl BenchSrc {
    pub fn new(case: &Case, meter: Arc<Meter>, neighbour: Option<Neighbour>) -> Self {
        let source: Self = glib::Object::new();
        source.set_format(gst::Format::Time);
        let pictures = (0..PICTURES)
            .map(|number| gst::Memory::from_slice(case.picture.paint(number)))
            .collect();
        imp::set_up(
            &source,
            imp::Work {
                case: case.clone(),
                meter,
                pictures,
                neighbour,
                start: Instant::now(),
                sent: 0,
                sent_beside: 0,
            },
        );
        source
    }
}

/// The time of frame `number`, since the start.
pub fn due(number: u32) -> Duration {
    Duration::from_secs(number.into()) / RATE
}

mod imp {
    use std::error::Error;
    use std::sync::{LazyLock, Mutex, PoisonError};

    use gst::subclass::prelude::*;
    use gst_base::subclass::base_src::CreateSuccess;
    use gst_base::subclass::prelude::*;

    use super::{
        Arc, Case, Duration, Format, Instant, Meter, Neighbour, PICTURES, Pace, STUCK, TURN, due,
        glib,
    };

    pub struct Work {
        pub case: Case,
        pub meter: Arc<Meter>,
        pub pictures: Vec<gst::Memory>,
        pub neighbour: Option<Neighbour>,
        pub start: Instant,
        pub sent: u32,
        /// By the neighbour.
        pub sent_beside: u32,
    }

    impl Work {
        /// Waits until the next frame is due, whoever carries it.
        fn wait(&mut self) {
            let number = self.sent + self.sent_beside;
            if number == 0 {
                self.start = Instant::now();
            }
            let due = self.start + due(number);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }

        /// Has the neighbour carry its turn's frames.
        fn give_way(&mut self) -> Result<(), Box<dyn Error>> {
            // Each has the machine to itself.
            self.meter.wait_until_empty(STUCK);
            let end = self.case.total().min(self.sent + TURN);
            while self.sent_beside < end {
                let number = self.sent_beside;
                self.wait();
                let Some(Neighbour { plain, meter }) = &mut self.neighbour else {
                    return Ok(());
                };
                let pixels = self.pictures[number as usize % PICTURES].map_readable()?;
                meter.enter();
                plain.send(number, &pixels)?;
                plain.read_reply()?;
                meter.leave();
                self.sent_beside += 1;
            }
            Ok(())
        }
    }

    #[derive(Default)]
    pub struct BenchSrc {
        work: Mutex<Option<Work>>,
    }

    pub fn set_up(source: &super::BenchSrc, work: Work) {
        *source
            .imp()
            .work
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(work);
    }

    #[glib::object_subclass]
    impl ObjectSubclass for BenchSrc {
        const NAME: &'static str = "ZerocopyBenchSrc";
        type Type = super::BenchSrc;
        type ParentType = gst_base::PushSrc;
    }

    impl ObjectImpl for BenchSrc {}
    impl GstObjectImpl for BenchSrc {}

    impl ElementImpl for BenchSrc {
        fn pad_templates() -> &'static [gst::PadTemplate] {
            static TEMPLATES: LazyLock<[gst::PadTemplate; 1]> = LazyLock::new(|| {
                [gst::PadTemplate::new(
                    "src",
                    gst::PadDirection::Src,
                    gst::PadPresence::Always,
                    &gst::Caps::new_any(),
                )
                .expect("the template is valid")]
            });
            TEMPLATES.as_ref()
        }
    }

    impl BaseSrcImpl for BenchSrc {
        fn is_seekable(&self) -> bool {
            false
        }

        fn caps(&self, _filter: Option<&gst::Caps>) -> Option<gst::Caps> {
            let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
            let picture = work.as_ref()?.case.picture;
            gst_video::VideoInfo::builder(
                video_format(picture.format),
                picture.width,
                picture.height,
            )
            .fps(gst::Fraction::new(super::RATE as i32, 1))
            .build()
            .ok()?
            .to_caps()
            .ok()
        }
    }

    impl PushSrcImpl for BenchSrc {
        fn create(
            &self,
            _buffer: Option<&mut gst::BufferRef>,
        ) -> Result<CreateSuccess, gst::FlowError> {
            let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
            let work = work.as_mut().ok_or(gst::FlowError::NotNegotiated)?;
            if work.sent == work.case.total() {
                return Err(gst::FlowError::Eos);
            }
            match work.case.pace {
                Pace::Flow => {}
                Pace::Single => work.meter.wait_until_empty(STUCK),
                Pace::Paced => {
                    if work.sent.is_multiple_of(TURN)
                        && let Err(error) = work.give_way()
                    {
                        let failed = gst::ResourceError::Failed;
                        gst::element_imp_error!(self, failed, ["a bare socket: {error}"]);
                        return Err(gst::FlowError::Error);
                    }
                    work.wait();
                }
            }
            let buffer = frame(work);
            work.sent += 1;
            work.meter.enter();
            Ok(CreateSuccess::NewBuffer(buffer))
        }
    }

    fn frame(work: &Work) -> gst::Buffer {
        let picture = work.case.picture;
        let mut buffer = gst::Buffer::new();
        let writable = buffer.get_mut().expect("it is new");
        writable.append_memory(work.pictures[work.sent as usize % PICTURES].clone());
        let time = |time: Duration| gst::ClockTime::from_nseconds(time.as_nanos() as u64);
        writable.set_pts(time(due(work.sent)));
        writable.set_duration(time(due(1)));
        if picture.padding > 0 {
            let stride = picture.stride();
            let chroma = stride * picture.height as usize;
            let planes = match picture.format {
                Format::Bgra => 1,
                Format::Nv12 => 2,
            };
            gst_video::VideoMeta::add_full(
                writable,
                gst_video::VideoFrameFlags::empty(),
                video_format(picture.format),
                picture.width,
                picture.height,
                &[0, chroma][..planes],
                &[stride as i32, stride as i32][..planes],
            )
            .expect("the layout fits the buffer");
        }
        buffer
    }

    fn video_format(format: Format) -> gst_video::VideoFormat {
        match format {
            Format::Bgra => gst_video::VideoFormat::Bgra,
            Format::Nv12 => gst_video::VideoFormat::Nv12,
        }
    }
}
