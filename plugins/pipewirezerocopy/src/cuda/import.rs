// SPDX-License-Identifier: MIT OR Apache-2.0

//! Copies DMA-BUFs into buffers of CUDA memory.

use std::ffi::c_void;
use std::ops::Deref;
use std::os::fd::BorrowedFd;

use super::context::Target;
use super::resource::{Done, EglResource, Rectangle, queue_copy};
use super::texture::Painter;
use super::{Context, Error};
use crate::egl::{self, DmaBuf};

/// How CUDA gets at the pixels of an EGLImage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The image is registered with CUDA as long as the producer has the buffer, and copied from
    /// where it lies: one copy, no drawing.
    Image,
    /// The image is drawn into a texture of our own, which is registered once, and copied from there.
    /// For drivers that do not register foreign images, and where bytes must change places.
    Texture,
}

impl Way {
    /// For logs and `stats`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "egl-image",
            Self::Texture => "gl-texture",
        }
    }
}

/// What makes images of DMA-BUFs: an EGL display, or a test.
///
/// # Safety
///
/// What [`raw`](Self::raw) gives must be an EGLImage of [`egl`](Self::egl)'s display, until the image is
/// dropped: drivers are handed it unseen.
pub unsafe trait Display {
    /// An EGLImage that lives until it is dropped.
    type Image;

    /// Makes one.
    fn import(&self, buffer: &DmaBuf<'_>) -> Result<Self::Image, egl::Error>;

    /// The `EGLImage`.
    fn raw(image: &Self::Image) -> *mut c_void;

    /// The EGL display that [`Way::Texture`] draws with.
    fn egl(&self) -> Result<&egl::Display, egl::Error>;
}

// SAFETY: an `egl::Image` is an EGLImage, and destroys it when it is dropped.
unsafe impl Display for egl::Display {
    type Image = egl::Image;

    fn import(&self, buffer: &DmaBuf<'_>) -> Result<egl::Image, egl::Error> {
        Self::import(self, buffer)
    }

    fn raw(image: &egl::Image) -> *mut c_void {
        image.as_ptr()
    }

    fn egl(&self) -> Result<&egl::Display, egl::Error> {
        Ok(self)
    }
}

/// A plane as an image of its own, which is what drivers agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plane {
    /// DRM fourcc of the image.
    pub fourcc: u32,
    pub bytes_per_pixel: u32,
    /// Pixels of the picture for one of the plane, across and down.
    pub subsampling: u32,
}

/// `DRM_FORMAT_R8` and `DRM_FORMAT_GR88` (drm_fourcc.h): one byte and two bytes for a pixel.
const R8: u32 = u32::from_le_bytes(*b"R8  ");
const GR88: u32 = u32::from_le_bytes(*b"GR88");

/// The planes of a format that can be copied.
pub(super) fn planes(format: u32) -> Option<Planes> {
    let plane = |fourcc, bytes_per_pixel, subsampling| Plane {
        fourcc,
        bytes_per_pixel,
        subsampling,
    };
    match &format.to_le_bytes() {
        b"AR24" | b"XR24" | b"AB24" | b"XB24" | b"RA24" | b"RX24" | b"BA24" | b"BX24" => {
            Some(Planes::One([plane(format, 4, 1)]))
        }
        b"NV12" => Some(Planes::Two([plane(R8, 1, 1), plane(GR88, 2, 2)])),
        _ => None,
    }
}

/// The DRM formats of the images that a picture of `format` is imported as, one for each plane; none
/// where it has no form in CUDA memory.
pub fn image_formats(format: u32) -> Vec<u32> {
    let planes = planes(format);
    let planes = planes.iter().flat_map(|planes| planes.iter());
    planes.map(|plane| plane.fourcc).collect()
}

/// One plane or two.
pub(super) enum Planes {
    One([Plane; 1]),
    Two([Plane; 2]),
}

impl Deref for Planes {
    type Target = [Plane];

    fn deref(&self) -> &[Plane] {
        match self {
            Self::One(planes) => planes,
            Self::Two(planes) => planes,
        }
    }
}

/// A buffer of the producer's, ready to be copied from, over and over: registering takes long now
/// and then (L15), so this lasts as long as the buffer. It shows what is in the memory at the time of
/// each copy.
///
/// It may be dropped on any thread; nothing is waited for then, since no copy outlasts
/// [`Importer::copy`].
pub struct Source<I = egl::Image> {
    images: Images<I>,
    planes: Planes,
    /// Pixels.
    width: u32,
    height: u32,
    context: Context,
    about: String,
}

enum Images<I> {
    /// In this order: a registration ends before its image.
    Registered(Vec<(EglResource, I)>),
    Drawn(Vec<I>),
}

impl<I> Source<I> {
    /// Whether it is of this context; another one cannot copy from it.
    pub fn is_of(&self, context: &Context) -> bool {
        self.context == *context
    }

    fn refused(&self, why: &str) -> Error {
        Error::Refused(format!("{}: {why}", self.about))
    }
}

/// Copies pictures in one CUDA context. It may be used from one thread at a time, and from another
/// one later.
pub struct Importer<D: Display = egl::Display> {
    // In the order in which they are dropped: all else needs the context.
    painter: Option<Painter>,
    done: Done,
    context: Context,
    display: D,
    way: Way,
}

impl<D: Display> Importer<D> {
    /// Copies images of `display` in `context`, which must be of the same GPU, by `way` or, where
    /// that is [`Way::Image`] and the driver refuses it, by [`Way::Texture`] from then on.
    pub fn new(display: D, context: &Context, way: Way) -> Result<Self, Error> {
        Ok(Self {
            painter: None,
            done: Done::new(context)?,
            context: context.clone(),
            display,
            way,
        })
    }

    /// How pixels are got at now.
    pub fn way(&self) -> Way {
        self.way
    }

    /// Whose memory it copies to.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Imports a buffer. The descriptors may be closed.
    pub fn prepare(&mut self, buffer: &DmaBuf<'_>) -> Result<Source<D::Image>, Error> {
        let about = egl::describe(buffer);
        let refused = |why: &str| Error::Refused(format!("{about}: {why}"));
        let planes = planes(buffer.fourcc).ok_or_else(|| refused("has no form in CUDA memory"))?;
        if planes.len() != buffer.planes.len() {
            return Err(refused("has another number of planes than its format"));
        }
        let images = planes.iter().zip(buffer.planes).map(|(plane, source)| {
            let part = DmaBuf {
                fourcc: plane.fourcc,
                width: buffer.width.div_ceil(plane.subsampling),
                height: buffer.height.div_ceil(plane.subsampling),
                planes: std::slice::from_ref(source),
                ..*buffer
            };
            Ok((self.display.import(&part)?, (part.width, part.height)))
        });
        let images = images.collect::<Result<Vec<_>, Error>>()?;
        Ok(Source {
            images: self.register(images, &planes)?,
            planes,
            width: buffer.width,
            height: buffer.height,
            context: self.context.clone(),
            about,
        })
    }

    fn register(
        &mut self,
        images: Vec<(D::Image, (u32, u32))>,
        planes: &[Plane],
    ) -> Result<Images<D::Image>, Error> {
        if self.way == Way::Image {
            let resources = images.iter().zip(planes).map(|((image, size), plane)| {
                // SAFETY: the display vouches for the image, which is put beside it below, to be dropped
                // after it.
                unsafe {
                    EglResource::new(&self.context, D::raw(image), *size, plane.bytes_per_pixel)
                }
            });
            match resources.collect::<Result<Vec<_>, Error>>() {
                Ok(resources) => {
                    let images = images.into_iter().map(|(image, _)| image);
                    return Ok(Images::Registered(
                        resources.into_iter().zip(images).collect(),
                    ));
                }
                // Drawing may do, if it can be done.
                Err(error @ Error::Refused(_)) => {
                    self.painter().map_err(|other| {
                        Error::Refused(format!("{error}; by a texture: {other}"))
                    })?;
                    self.way = Way::Texture;
                }
                Err(error) => return Err(error),
            }
        }
        self.painter()?;
        let images = images.into_iter().map(|(image, _)| image);
        Ok(Images::Drawn(images.collect()))
    }

    /// Copies the part of a picture that begins at pixel `at` and is as large as `info` says into a
    /// buffer of a pool of the context. When it returns, the copy is done, and the picture may be
    /// drawn over (L16). Whoever draws it must be finished.
    pub fn copy(
        &mut self,
        source: &Source<D::Image>,
        at: (u32, u32),
        buffer: &mut gst::BufferRef,
        info: &gst_video::VideoInfo,
    ) -> Result<(), Error> {
        let size = (info.width(), info.height());
        self.begin(source, at, size, &[])?.copy(buffer, info)
    }

    /// Begins a copy of a picture that may still be drawn: until all of `fences`, which are sync files,
    /// are signalled. Where the GPU can wait for them, it does, and [`Begun::waits`] says so.
    pub fn begin<'a>(
        &'a mut self,
        source: &'a Source<D::Image>,
        at: (u32, u32),
        size: (u32, u32),
        fences: &[BorrowedFd<'_>],
    ) -> Result<Begun<'a, D>, Error> {
        let fits = |from: u32, size: u32, all| from.checked_add(size).is_some_and(|end| end <= all);
        if !fits(at.0, size.0, source.width) || !fits(at.1, size.1, source.height) {
            return Err(source.refused("is smaller than what is to be copied"));
        }
        if !source.is_of(&self.context) {
            return Err(source.refused("was imported in another context"));
        }
        let mut drawing = false;
        if let Images::Drawn(images) = &source.images {
            let context = self.context.clone();
            let painter = self.painter()?;
            // A driver that takes no fence leaves the wait to the thread.
            if !fences.is_empty() && painter.wait_for(fences).is_ok() {
                let _current = context.enter()?;
                painter.draw(images.iter().map(D::raw), &source.planes, at, size)?;
                drawing = true;
            }
        }
        Ok(Begun {
            importer: self,
            source,
            at,
            size,
            drawing,
        })
    }

    /// What draws, made when first needed.
    fn painter(&mut self) -> Result<&mut Painter, Error> {
        let painter = match self.painter.take() {
            Some(painter) => painter,
            None => Painter::new(self.display.egl()?, &self.context)?,
        };
        Ok(self.painter.insert(painter))
    }
}

/// A copy that has begun. Dropping it leaves it at that: what the GPU was told to draw, it draws into
/// textures of ours.
pub struct Begun<'a, D: Display> {
    importer: &'a mut Importer<D>,
    source: &'a Source<D::Image>,
    at: (u32, u32),
    size: (u32, u32),
    /// The GPU has been told to draw, after what it waits for.
    drawing: bool,
}

impl<D: Display> Begun<'_, D> {
    /// Whether the GPU waits for the fences. Else somebody must, before [`copy`](Self::copy).
    pub fn waits(&self) -> bool {
        self.drawing
    }

    /// Copies into a buffer of a pool of the context, for pictures of `info`. When it returns, the copy is
    /// done, and the picture may be drawn over (L16).
    pub fn copy(
        self,
        buffer: &mut gst::BufferRef,
        info: &gst_video::VideoInfo,
    ) -> Result<(), Error> {
        let Self {
            importer,
            source,
            at,
            size,
            drawing,
        } = self;
        let context = importer.context.clone();
        let target = Target::map(buffer, info, &context)?;
        let place = |index: usize, part: Rectangle| {
            target
                .plane(index, part.width, part.rows)
                .ok_or_else(|| source.refused("does not fit a buffer of the pool"))
        };
        let stream = target.stream();
        let _current = context.enter()?;
        let planes = source.planes.iter().enumerate();
        let queued = match &source.images {
            Images::Registered(images) => {
                planes
                    .zip(images)
                    .try_for_each(|((index, plane), (resource, _))| {
                        let part = plane.part(at, size);
                        queue_copy(resource.pixels(), part, place(index, part)?, stream)
                    })
            }
            Images::Drawn(images) => {
                let painter = importer.painter()?;
                if !drawing {
                    painter.draw(images.iter().map(D::raw), &source.planes, at, size)?;
                }
                painter.finish()?;
                planes
                    .map(|(index, plane)| (index, plane.part((0, 0), size)))
                    .try_for_each(|(index, part)| {
                        let to = place(index, part)?;
                        painter.pixels(index, stream, |pixels| queue_copy(pixels, part, to, stream))
                    })
            }
        };
        // Also after an error: one plane may be on its way.
        queued.and(importer.done.wait(stream))
    }
}

impl Plane {
    /// What is copied of this plane for a picture of this size, from pixel `at`.
    fn part(self, at: (u32, u32), size: (u32, u32)) -> Rectangle {
        let bytes = self.bytes_per_pixel as usize;
        Rectangle {
            x: (at.0 / self.subsampling) as usize * bytes,
            y: (at.1 / self.subsampling) as usize,
            width: size.0.div_ceil(self.subsampling) as usize * bytes,
            rows: size.1.div_ceil(self.subsampling) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: [u8; 4]) -> Option<Planes> {
        planes(u32::from_le_bytes(name))
    }

    #[test]
    fn nv12_is_copied_as_two_planes_and_odd_sizes_keep_their_last_colour() {
        let Some(Planes::Two([luma, chroma])) = of(*b"NV12") else {
            panic!("two planes");
        };
        let part = |plane: Plane| {
            let Rectangle { x, y, width, rows } = plane.part((6, 4), (1365, 767));
            (x, y, width, rows)
        };
        assert_eq!(part(luma), (6, 4, 1365, 767));
        assert_eq!(part(chroma), (6, 2, 1366, 384));
    }

    #[test]
    fn pixels_of_four_bytes_are_copied_as_they_lie() {
        for name in [
            b"AR24", b"XR24", b"AB24", b"XB24", b"RA24", b"RX24", b"BA24", b"BX24",
        ] {
            let plane = of(*name).unwrap()[0];
            assert_eq!(plane.fourcc.to_le_bytes(), *name);
            assert_eq!((plane.bytes_per_pixel, plane.subsampling), (4, 1));
        }
        assert!(of(*b"YUYV").is_none());
    }
}
