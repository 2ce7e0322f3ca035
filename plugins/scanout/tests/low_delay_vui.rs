// SPDX-License-Identifier: MIT OR Apache-2.0

//! scanoutsrc's low-delay-vui, in front of a decoder that holds pictures back without it.

use std::sync::Once;

use gst::prelude::*;
use gst_check::Harness;
use h264_reader::nal::sps::{BitstreamRestrictions, SeqParameterSet};
use h264_reader::nal::{NalHeader, WritableNal};
use h264_reader::rbsp::{BitReader, decode_nal};
use helix_protocol::{Message, encode, h264};
use zerocopy_test_support::peer::{Peer, Then};

const FRAMES: usize = 8;

fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        gst::init().unwrap();
        gstscanout::plugin_register_static().unwrap();
    });
}

/// What x264 writes for low delay: a keyframe and deltas, none of them out of order.
fn stream() -> Vec<Vec<u8>> {
    init();
    let mut encoder = Harness::new_parse(&format!(
        "videotestsrc num-buffers={FRAMES} ! video/x-raw,format=I420,width=320,height=240 ! \
         x264enc tune=zerolatency key-int-max=1000 ! h264parse config-interval=-1 ! \
         capsfilter caps=video/x-h264,stream-format=byte-stream,alignment=au"
    ));
    encoder.play();
    (0..FRAMES)
        .map(|_| encoder.pull().unwrap().map_readable().unwrap().to_vec())
        .collect()
}

/// Has the parameter set of the stream's keyframe say something else.
fn change(stream: &mut [Vec<u8>], change: impl FnOnce(&mut SeqParameterSet)) {
    let keyframe = &mut stream[0];
    let nal = h264::find_sps(keyframe).unwrap();
    let at = nal.as_ptr() as usize - keyframe.as_ptr() as usize;
    let bits = decode_nal(nal).unwrap();
    let mut sps = SeqParameterSet::from_bits(BitReader::new(bits.as_ref())).unwrap();
    change(&mut sps);
    let new = sps.to_vec_with_header(NalHeader::new(nal[0]).unwrap());
    let end = at + nal.len();
    keyframe.splice(at..end, new);
}

/// As encoders write it that could reorder and do not.
fn announce_reordering(sps: &mut SeqParameterSet) {
    let vui = sps.vui_parameters.as_mut().unwrap();
    let restrictions = vui.bitstream_restrictions.as_mut().unwrap();
    assert_eq!(restrictions.max_num_reorder_frames, 0);
    *restrictions = BitstreamRestrictions {
        max_num_reorder_frames: 2,
        max_dec_frame_buffering: 4,
        ..restrictions.clone()
    };
}

/// What scanoutsrc makes of a stream, and its caps.
fn through_the_element(stream: &[Vec<u8>], properties: &str) -> (Vec<gst::Buffer>, gst::Caps) {
    init();
    let units = stream.to_vec();
    let peer = Peer::new(move |link, envelope| {
        if let Message::Subscribe { scanout_id } = envelope.message {
            link.send(encode::subscribe_resp(scanout_id, true));
            for (index, unit) in units.iter().enumerate() {
                link.respond(1, index as i64 * 16_666_667, index == 0, unit);
            }
        }
        link.pong(envelope);
        Then::GoOn
    });
    let port = peer.port();
    let launch = format!("scanoutsrc scanout-id=1 tcp-host=127.0.0.1 tcp-port={port} {properties}");
    let mut source = Harness::new_parse(&launch);
    source.use_systemclock();
    source.play();
    let buffers = stream.iter().map(|_| source.pull().unwrap()).collect();
    let caps = source.sinkpad().unwrap().current_caps().unwrap();
    (buffers, caps)
}

/// How many buffers a decoder takes before it shows the first picture.
fn first_picture_after(buffers: &[gst::Buffer], caps: &gst::Caps) -> Option<usize> {
    // A thread a frame would hold pictures back for a reason of its own.
    let mut decoder = Harness::new_parse("h264parse ! avdec_h264 max-threads=1");
    decoder.set_src_caps(caps.clone());
    decoder.play();
    buffers.iter().enumerate().find_map(|(index, buffer)| {
        decoder.push(buffer.clone()).unwrap();
        decoder.try_pull().map(|_| index + 1)
    })
}

fn bytes(buffers: &[gst::Buffer]) -> Vec<Vec<u8>> {
    buffers
        .iter()
        .map(|buffer| buffer.map_readable().unwrap().to_vec())
        .collect()
}

#[test]
fn a_decoder_shows_each_picture_at_once() {
    let mut stream = stream();
    change(&mut stream, announce_reordering);
    let (untouched, caps) = through_the_element(&stream, "");
    assert_eq!(bytes(&untouched), stream);
    assert_eq!(first_picture_after(&untouched, &caps), Some(3));
    let (rewritten, caps_after) = through_the_element(&stream, "low-delay-vui=true");
    assert_eq!(caps_after, caps);
    assert_eq!(first_picture_after(&rewritten, &caps_after), Some(1));
}

#[test]
fn only_the_parameter_set_is_new() {
    let original = stream();
    let mut announced = original.clone();
    change(&mut announced, announce_reordering);
    let (rewritten, _) = through_the_element(&announced, "low-delay-vui=true");
    let mut wanted = original.clone();
    change(&mut wanted, |sps| {
        let vui = sps.vui_parameters.as_mut().unwrap();
        let restrictions = vui.bitstream_restrictions.as_mut().unwrap();
        restrictions.max_dec_frame_buffering = sps.max_num_ref_frames;
    });
    // Before, the parameter set, behind; mapping makes one of them.
    assert_eq!(rewritten[0].n_memory(), 3);
    assert_eq!(rewritten[1].n_memory(), 1);
    assert_eq!(bytes(&rewritten), wanted);
}

#[test]
fn a_parameter_set_without_a_word_on_it_gets_one() {
    for without in [
        (|sps| sps.vui_parameters = None) as fn(&mut SeqParameterSet),
        |sps| sps.vui_parameters.as_mut().unwrap().bitstream_restrictions = None,
    ] {
        let mut stream = stream();
        change(&mut stream, without);
        let (rewritten, caps) = through_the_element(&stream, "low-delay-vui=true");
        let keyframe = &bytes(&rewritten)[0];
        let bits = decode_nal(h264::find_sps(keyframe).unwrap()).unwrap();
        let sps = SeqParameterSet::from_bits(BitReader::new(bits.as_ref())).unwrap();
        let restrictions = sps.vui_parameters.unwrap().bitstream_restrictions.unwrap();
        assert_eq!(restrictions.max_num_reorder_frames, 0);
        assert_eq!(restrictions.max_dec_frame_buffering, sps.max_num_ref_frames);
        assert_eq!(first_picture_after(&rewritten, &caps), Some(1));
    }
}

#[test]
fn a_stream_that_says_it_already_is_left_as_it_is() {
    let stream = stream();
    let (buffers, _) = through_the_element(&stream, "low-delay-vui=true");
    assert_eq!(buffers[0].n_memory(), 1);
    assert_eq!(bytes(&buffers), stream);
}
