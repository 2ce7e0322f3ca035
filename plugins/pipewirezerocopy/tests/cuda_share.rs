// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whose CUDA context it is: downstream's, the application's or one of our own, against a libcuda without
//! a GPU (tests/cuda-fake) and the real libgstcuda.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use gst::glib;
use gst::prelude::*;
use gst::subclass::prelude::*;
use gstpipewirezerocopy::cuda::{self, CONTEXT_TYPE, Context, Slot};
use zerocopy_cuda_fake::{Alive, Fake};

/// The library, for one test at a time: what it counts is the whole process's. None where this
/// GStreamer has no CUDA memory.
fn fake() -> Option<MutexGuard<'static, Fake>> {
    static FAKE: OnceLock<Mutex<Fake>> = OnceLock::new();
    gst::init().unwrap();
    let (major, minor, ..) = gst::version();
    if (major, minor) < (1, 24) {
        println!("not run: GStreamer {major}.{minor} has no libgstcuda that would do");
        return None;
    }
    let fake = FAKE.get_or_init(|| Mutex::new(Fake::load()));
    let fake = fake.lock().unwrap_or_else(PoisonError::into_inner);
    cuda::available().unwrap();
    Some(fake)
}

mod holder {
    use super::*;

    /// An element that keeps what it is given, as pipewirezerocopysrc does.
    #[derive(Default)]
    pub struct Holder {
        pub slot: Slot,
    }

    #[glib::object_subclass]
    impl ObjectSubclass for Holder {
        const NAME: &'static str = "TestContextHolder";
        type Type = super::Holder;
        type ParentType = gst::Element;
    }

    impl ObjectImpl for Holder {}
    impl GstObjectImpl for Holder {}

    impl ElementImpl for Holder {
        fn set_context(&self, context: &gst::Context) {
            cuda::set_context(&self.slot, context);
            self.parent_set_context(context);
        }
    }
}

glib::wrapper! {
    pub struct Holder(ObjectSubclass<holder::Holder>) @extends gst::Element, gst::Object;
}

/// An element with a neighbour downstream, in an application.
struct Scene {
    element: Holder,
    source: gst::Pad,
    sink: gst::Pad,
    bus: gst::Bus,
}

impl Scene {
    /// Each of them shares a context, if it has one.
    fn new(downstream: Option<&Context>, application: Option<&Context>) -> Self {
        let element: Holder = glib::Object::new();
        let source = gst::Pad::new(gst::PadDirection::Src);
        element.add_pad(&source).unwrap();
        let shared = |context: &Context| context.to_shared().unwrap();
        let answer = downstream.map(shared);
        let sink = gst::Pad::builder(gst::PadDirection::Sink)
            .query_function(move |pad, parent, query| {
                if let (gst::QueryViewMut::Context(query), Some(answer)) =
                    (query.view_mut(), &answer)
                {
                    query.set_context(answer);
                    return true;
                }
                gst::Pad::query_default(pad, parent, query)
            })
            .build();
        for pad in [&source, &sink] {
            pad.set_active(true).unwrap();
        }
        // Pads without a template name the caps that they have for all that they can.
        source.link_full(&sink, gst::PadLinkCheck::empty()).unwrap();
        let bus = gst::Bus::new();
        let answer = application.map(shared);
        bus.set_sync_handler(move |_, message| {
            if let (gst::MessageView::NeedContext(need), Some(answer)) = (message.view(), &answer) {
                assert_eq!(need.context_type(), CONTEXT_TYPE);
                let element = message.src().and_then(|src| src.downcast_ref::<Holder>());
                element.unwrap().set_context(answer);
            }
            gst::BusSyncReply::Pass
        });
        element.set_bus(Some(&bus));
        Self {
            element,
            source,
            sink,
            bus,
        }
    }

    fn slot(&self) -> &Slot {
        &self.element.imp().slot
    }

    fn ensure(&self, device: u32) -> Result<Context, cuda::Error> {
        cuda::ensure(self.element.upcast_ref(), &self.source, self.slot(), device)
    }

    /// The messages so far.
    fn said(&self) -> Vec<gst::MessageType> {
        std::iter::from_fn(|| self.bus.pop())
            .map(|message| message.type_())
            .collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // It keeps what the application gave, and messages keep the element.
        self.bus.unset_sync_handler();
        self.bus.set_flushing(true);
        self.source.unlink(&self.sink).unwrap();
    }
}

fn nothing_left(fake: &Fake) {
    assert_eq!(fake.alive(), Alive::default());
}

#[test]
fn downstreams_context_is_taken_and_nobody_else_asked() {
    let Some(fake) = fake() else { return };
    let theirs = Context::new(0).unwrap();
    let other = Context::new(0).unwrap();
    let scene = Scene::new(Some(&theirs), Some(&other));
    assert_eq!(scene.ensure(0), Ok(theirs.clone()));
    assert_eq!(scene.said(), []);
    assert_eq!(scene.ensure(0), Ok(theirs.clone()), "and kept");
    assert_eq!(fake.alive().contexts, 2, "none was made");
    drop((scene, theirs, other));
    nothing_left(&fake);
}

#[test]
fn the_applications_context_is_taken_where_downstream_has_none() {
    let Some(fake) = fake() else { return };
    let theirs = Context::new(0).unwrap();
    let scene = Scene::new(None, Some(&theirs));
    assert_eq!(scene.ensure(0), Ok(theirs.clone()));
    assert_eq!(scene.said(), [gst::MessageType::NeedContext]);
    assert_eq!(fake.alive().contexts, 1, "none was made");
    drop((scene, theirs));
    nothing_left(&fake);
}

#[test]
fn a_context_of_our_own_is_told_to_the_others() {
    let Some(fake) = fake() else { return };
    let scene = Scene::new(None, None);
    let mut query = gst::query::Context::new(CONTEXT_TYPE);
    assert!(!cuda::answer(scene.slot(), &mut query), "there is none yet");
    let ours = scene.ensure(1).unwrap();
    assert_eq!(ours.device(), 1);
    assert_eq!(
        scene.said(),
        [gst::MessageType::NeedContext, gst::MessageType::HaveContext]
    );
    assert!(cuda::answer(scene.slot(), &mut query));
    let answered = query.context_owned().unwrap();
    assert_eq!(Context::from_shared(&answered), Some(ours.clone()));
    let mut foreign = gst::query::Context::new("gst.gl.GLDisplay");
    assert!(!cuda::answer(scene.slot(), &mut foreign));
    assert!(foreign.context().is_none());
    drop((scene, query, answered, ours));
    nothing_left(&fake);
}

#[test]
fn a_context_of_another_device_is_not_taken() {
    let Some(fake) = fake() else { return };
    let (downstream, application) = (Context::new(0).unwrap(), Context::new(0).unwrap());
    let scene = Scene::new(Some(&downstream), Some(&application));
    let ours = scene.ensure(1).unwrap();
    assert_eq!(ours.device(), 1);
    assert!(scene.said().contains(&gst::MessageType::HaveContext));
    drop((scene, downstream, application, ours));
    nothing_left(&fake);
}

#[test]
fn what_an_application_gives_before_the_start_is_taken_where_downstream_has_none() {
    let Some(fake) = fake() else { return };
    let theirs = Context::new(0).unwrap();
    let scene = Scene::new(None, None);
    scene.element.set_context(&theirs.to_shared().unwrap());
    // As the element's start does.
    scene.slot().reset(None);
    assert_eq!(scene.ensure(0), Ok(theirs.clone()));
    assert_eq!(scene.said(), []);
    drop((scene, theirs));
    nothing_left(&fake);
}

#[test]
fn downstreams_context_goes_before_one_of_an_earlier_run() {
    let Some(fake) = fake() else { return };
    let (earlier, theirs) = (Context::new(0).unwrap(), Context::new(0).unwrap());
    let scene = Scene::new(Some(&theirs), None);
    // GstElement keeps it past the state NULL.
    scene.element.set_context(&earlier.to_shared().unwrap());
    scene.slot().reset(None);
    assert_eq!(scene.ensure(0), Ok(theirs.clone()));
    drop((scene, earlier, theirs));
    nothing_left(&fake);
}

#[test]
fn a_context_that_is_lost_is_not_taken_again() {
    let Some(fake) = fake() else { return };
    let scene = Scene::new(None, None);
    let lost = scene.ensure(0).unwrap();
    scene.slot().bury();
    // The next start: GstElement has it still.
    scene.slot().reset(None);
    assert!(scene.element.context(CONTEXT_TYPE).is_some());
    let new = scene.ensure(0).unwrap();
    assert_ne!(new, lost);
    drop((scene, lost, new));
    nothing_left(&fake);
}
