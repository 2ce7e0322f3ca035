// SPDX-License-Identifier: MIT OR Apache-2.0

//! What vsockenc takes: caps in, what a frame of them is, and what upstream may do about memory.

use gst_video::prelude::*;

use crate::session::HELD;

/// The formats, and their names where the caps say `format=DMA_DRM`: the DRM fourcc without a
/// modifier, which stands for DRM_FORMAT_MOD_LINEAR (gst_video_dma_drm_fourcc_to_string()).
///
/// Linear only. What a tiled buffer holds could not be read where its resource id is of no use,
/// and GStreamer has no name for "no modifier": that is what the plain formats with
/// memory:DMABuf are for, and what virtio-gpu's buffers have.
const FORMATS: [(gst_video::VideoFormat, &str); 5] = [
    (gst_video::VideoFormat::Bgrx, "XR24"),
    (gst_video::VideoFormat::Bgra, "AR24"),
    (gst_video::VideoFormat::Rgbx, "XB24"),
    (gst_video::VideoFormat::Rgba, "AB24"),
    (gst_video::VideoFormat::Nv12, "NV12"),
];

/// Pixels.
const LARGEST_SIDE: i32 = 8192;

/// What the sink pad takes: DMA-BUFs first where `dmabuf_first`, for those who can have either.
pub fn sink_caps(dmabuf_first: bool) -> gst::Caps {
    let system = gst_video::VideoCapsBuilder::new()
        .format_list(FORMATS.map(|(format, _)| format))
        .width_range(1..=LARGEST_SIDE)
        .height_range(1..=LARGEST_SIDE)
        .build();
    let dmabuf = dmabuf_caps(&system);
    let (mut first, second) = if dmabuf_first {
        (dmabuf, system)
    } else {
        (system, dmabuf)
    };
    first.make_mut().append(second);
    first
}

fn dmabuf_caps(system: &gst::CapsRef) -> gst::Caps {
    let feature = || gst::CapsFeatures::new([gst_allocators::CAPS_FEATURE_MEMORY_DMABUF]);
    let mut caps = gst::Caps::new_empty();
    let writable = caps.make_mut();
    for structure in system.iter() {
        // Without 1.24, gst_video_info_from_caps() does not know the format.
        #[cfg(feature = "v1_24")]
        {
            let mut drm = structure.to_owned();
            drm.set("format", "DMA_DRM");
            drm.set(
                "drm-format",
                gst::List::new(FORMATS.map(|(_, drm_format)| drm_format)),
            );
            writable.append_structure_full(drm, Some(feature()));
        }
        writable.append_structure_full(structure.to_owned(), Some(feature()));
    }
    caps
}

/// Whether frames with these caps are DMA-BUFs.
pub fn is_dmabuf(caps: &gst::CapsRef) -> bool {
    caps.features(0)
        .is_some_and(|features| features.contains(gst_allocators::CAPS_FEATURE_MEMORY_DMABUF))
}

/// The format and layout of frames with these caps, DMA_DRM caps included.
pub fn video_info(caps: &gst::CapsRef) -> Option<gst_video::VideoInfo> {
    let structure = caps.structure(0)?;
    let Ok(drm_format) = structure.get::<&str>("drm-format") else {
        return gst_video::VideoInfo::from_caps(caps).ok();
    };
    let (format, _) = FORMATS.iter().find(|(_, name)| *name == drm_format)?;
    let mut plain = structure.to_owned();
    plain.set("format", format.to_str());
    plain.remove_field("drm-format");
    let plain: gst::Caps = [plain].into_iter().collect();
    gst_video::VideoInfo::from_caps(&plain).ok()
}

/// The protocol says nothing of fields, and the host would encode two of them as one picture. It is
/// not in the caps: most sources say nothing about it, and caps without it are no subset of caps
/// with it.
pub fn check_progressive(info: &gst_video::VideoInfo) -> Result<(), String> {
    if info.interlace_mode() == gst_video::VideoInterlaceMode::Progressive {
        return Ok(());
    }
    Err(format!(
        "interlace-mode={} cannot be encoded, only progressive video can: put a `deinterlace` in \
         front",
        info.interlace_mode().to_str()
    ))
}

/// Answers what upstream asks before it allocates: strides, offsets and crops cost nothing, and
/// at least `buffers` are held at once, of DMA-BUFs [`HELD`] - 1 more.
pub fn propose_allocation(query: &mut gst::query::Allocation, buffers: u32) {
    query.add_allocation_meta::<gst_video::VideoMeta>(None);
    query.add_allocation_meta::<gst_video::VideoCropMeta>(None);
    let (Some(caps), need_pool) = query.get_owned() else {
        return;
    };
    let Some(info) = video_info(&caps) else {
        return;
    };
    let size = info.size() as u32;
    let is_dmabuf = is_dmabuf(&caps);
    // Resources that a host may keep although it does not answer.
    let kept = if is_dmabuf { HELD - 1 } else { 0 };
    let buffers = buffers + kept;
    // Nobody but upstream can make its DMA-BUFs.
    let pool = (need_pool && !is_dmabuf).then(gst_video::VideoBufferPool::new);
    let pool = pool.filter(|pool| {
        let mut config = pool.config();
        config.set_params(Some(&caps), size, buffers, 0);
        config.add_option(gst_video::BUFFER_POOL_OPTION_VIDEO_META);
        pool.set_config(config).is_ok()
    });
    query.add_allocation_pool(pool.as_ref(), size, buffers, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(text: &str) -> gst::Caps {
        gst::init().unwrap();
        text.parse().unwrap()
    }

    #[test]
    fn both_kinds_of_memory_are_taken_in_the_order_asked_for() {
        gst::init().unwrap();
        for dmabuf_first in [true, false] {
            let sink = sink_caps(dmabuf_first);
            assert_eq!(is_dmabuf(&sink), dmabuf_first);
            for features in ["", "(memory:DMABuf)"] {
                for size in [1, 8192] {
                    let wanted = format!(
                        "video/x-raw{features},format=NV12,width={size},height={size},\
                         framerate=0/1"
                    );
                    assert!(caps(&wanted).can_intersect(&sink), "{wanted}");
                }
                let too_large = format!("video/x-raw{features},format=NV12,width=8193,height=2");
                assert!(!caps(&too_large).can_intersect(&sink));
            }
            assert!(!caps("video/x-raw(memory:CUDAMemory)").can_intersect(&sink));
        }
    }

    #[test]
    fn dma_drm_caps_are_taken_from_gstreamer_1_24_on_and_linear() {
        let sink = {
            gst::init().unwrap();
            sink_caps(true)
        };
        let drm = |format: &str| {
            let text = format!(
                "video/x-raw(memory:DMABuf),format=DMA_DRM,drm-format={format},width=64,height=48"
            );
            caps(&text).can_intersect(&sink)
        };
        assert_eq!(drm("AR24"), cfg!(feature = "v1_24"));
        assert!(!drm("AR24:0x0100000000000002"));
    }

    #[test]
    fn drm_formats_name_the_bytes_in_memory() {
        for (format, drm_format) in FORMATS {
            let info = video_info(&caps(&format!(
                "video/x-raw(memory:DMABuf),format=DMA_DRM,drm-format={drm_format},width=64,\
                 height=48,framerate=30/1"
            )))
            .unwrap();
            assert_eq!(info.format(), format);
            assert_eq!((info.width(), info.height()), (64, 48));
            assert_eq!(info.fps(), gst::Fraction::new(30, 1));
        }
        let other = "video/x-raw(memory:DMABuf),format=DMA_DRM,drm-format=P010,width=64,height=48";
        assert!(video_info(&caps(other)).is_none());
    }

    fn proposed(text: &str) -> gst::query::Allocation<gst::Query> {
        let mut query = gst::query::Allocation::new(Some(&caps(text)), true);
        propose_allocation(&mut query, 3);
        query
    }

    #[test]
    fn strides_and_crops_are_said_to_be_understood() {
        for features in ["", "(memory:DMABuf)"] {
            let query = proposed(&format!(
                "video/x-raw{features},format=NV12,width=1366,height=768"
            ));
            for api in [
                gst_video::VideoMeta::meta_api(),
                gst_video::VideoCropMeta::meta_api(),
            ] {
                let found = query.allocation_metas().filter(|(meta, _)| *meta == api);
                assert_eq!(found.count(), 1);
            }
        }
    }

    #[test]
    fn a_pool_of_system_memory_is_for_system_memory_only() {
        let query = proposed("video/x-raw,format=NV12,width=1280,height=720");
        let (pool, size, min, max) = query.allocation_pools().next().unwrap();
        assert_eq!((size, min, max), (1280 * 720 * 3 / 2, 3, 0));
        let pool = pool.expect("a pool");
        pool.set_active(true).unwrap();
        let buffer = pool.acquire_buffer(None).unwrap();
        assert_eq!(buffer.size(), 1280 * 720 * 3 / 2);
        pool.set_active(false).unwrap();

        let query = proposed("video/x-raw(memory:DMABuf),format=NV12,width=1280,height=720");
        let (pool, _, min, _) = query.allocation_pools().next().unwrap();
        assert!(pool.is_none());
        assert_eq!(min, 3 + HELD - 1);
    }

    #[test]
    fn a_query_without_caps_is_answered_too() {
        gst::init().unwrap();
        let mut query = gst::query::Allocation::new(None, false);
        propose_allocation(&mut query, 3);
        assert_eq!(query.allocation_metas().count(), 2);
        assert_eq!(query.allocation_pools().count(), 0);
    }
}
