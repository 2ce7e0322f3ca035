// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the pixels of a frame lie in the producer's memory.
//!
//! Every number here comes from another process, through memory that it can still write to. It is
//! read once, then checked against what is really mapped with arithmetic that cannot wrap, and
//! only a [`FrameLayout`] that passed says where to read (decision 10: trust nothing that is read).

use std::fmt;

use super::format::{PixelFormat, PlaneShape};

/// Largest width and height believed, in pixels: more than any display, and small enough that
/// no product of two of them with a pixel's size comes near the end of 64 bits.
pub const MAX_DIMENSION: u32 = 32_768;

/// The most planes that a carried format has.
pub const MAX_PLANES: usize = 2;

/// What the producer says about one block of memory (`struct spa_chunk`), and how long that
/// block really is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes mapped, from the block's beginning. This one is ours, not the producer's.
    pub mapped: usize,
    /// Offset of the first pixel in bytes, to be taken modulo `mapped` (`spa/buffer/buffer.h`).
    pub offset: u32,
    /// Bytes of valid data from `offset` on.
    pub size: u32,
    /// Bytes from one row to the next; 0 where the producer does not say.
    pub stride: i32,
}

/// A rectangle in pixels (`struct spa_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Left edge.
    pub x: i32,
    /// Upper edge.
    pub y: i32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

/// Where one plane lies. Reading `row_bytes` at `offset + n * stride` for each `n < rows` stays
/// within the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlaneLayout {
    /// Which of the buffer's memory blocks.
    pub block: usize,
    /// First pixel, in bytes from the block's beginning.
    pub offset: usize,
    /// Bytes from row to row.
    pub stride: usize,
    /// Bytes of pixels in a row.
    pub row_bytes: usize,
    /// Number of rows.
    pub rows: usize,
}

/// What of one memory block a frame needs to be read in place: whole rows, the padding of the last
/// one included. Unlike a plane's pixels, that padding may lie behind the block's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which of the buffer's memory blocks.
    pub block: usize,
    /// First byte.
    pub start: usize,
    /// Number of bytes.
    pub len: usize,
}

/// Where a frame's pixels lie, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLayout {
    /// Format of the pixels.
    pub format: PixelFormat,
    /// Width in pixels, after cropping.
    pub width: u32,
    /// Height in pixels, after cropping.
    pub height: u32,
    /// The buffer's pixel at which the frame begins, as left and top: (0, 0) unless it is a crop.
    pub origin: (u32, u32),
    planes: [PlaneLayout; MAX_PLANES],
    /// How many of them are known.
    count: usize,
}

/// Why a frame cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// Width or height is 0 or beyond [`MAX_DIMENSION`].
    Size(u32, u32),
    /// The buffer has this many blocks, and the format needs another number.
    Blocks(usize),
    /// Rows would overlap or run backwards: this stride for that many bytes in a row.
    Stride(i32, usize),
    /// The pixels would end at `end`, but the block's valid data ends at `limit` (bytes).
    OutOfBounds {
        /// Which block.
        block: usize,
        /// Where the last pixel would end.
        end: usize,
        /// Where valid data ends.
        limit: usize,
    },
    /// The numbers do not fit this machine's address space.
    Overflow,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(width, height) => write!(
                f,
                "a frame of {width}x{height} (1x1 to {MAX_DIMENSION}x{MAX_DIMENSION} can be)"
            ),
            Self::Blocks(n) => write!(f, "{n} memory blocks do not make a frame of this format"),
            Self::Stride(stride, row) => {
                write!(f, "a stride of {stride} bytes for rows of {row} bytes")
            }
            Self::OutOfBounds { block, end, limit } => write!(
                f,
                "pixels up to byte {end} of block {block}, which ends at byte {limit}"
            ),
            Self::Overflow => f.write_str("sizes beyond the address space"),
        }
    }
}

impl std::error::Error for LayoutError {}

impl FrameLayout {
    /// Checks what the producer said about a frame of the negotiated format and size.
    ///
    /// Planes may come in a block each, or one behind the other in a single block. In the latter
    /// case the second begins after an even number of rows of the first, as GStreamer and
    /// PipeWire lay NV12 out.
    pub fn new(
        format: PixelFormat,
        width: u32,
        height: u32,
        chunks: &[Chunk],
    ) -> Result<Self, LayoutError> {
        let mut layout = Self::without_planes(format, width, height)?;
        let shapes = format.planes();
        let contiguous = match chunks.len() {
            0 => return Err(LayoutError::Blocks(0)),
            1 => true,
            n if n >= shapes.len() => false,
            n => return Err(LayoutError::Blocks(n)),
        };

        let mut behind_previous = 0;
        for (index, shape) in shapes.iter().enumerate() {
            let block = if contiguous { 0 } else { index };
            let chunk = &chunks[block];
            let row_bytes = shape.row_bytes(width).ok_or(LayoutError::Overflow)?;
            let rows = shape.rows(height);
            let rows_in_block = if contiguous {
                contiguous_rows(shapes, height)
            } else {
                rows
            };
            let stride = stride(chunk, row_bytes, rows_in_block)?;
            let start = block_start(chunk);
            let offset = if contiguous {
                start.checked_add(behind_previous)
            } else {
                Some(start)
            }
            .ok_or(LayoutError::Overflow)?;

            let end = (rows - 1)
                .checked_mul(stride)
                .and_then(|above| above.checked_add(row_bytes))
                .and_then(|length| length.checked_add(offset))
                .ok_or(LayoutError::Overflow)?;
            let limit = start
                .checked_add(chunk.size as usize)
                .ok_or(LayoutError::Overflow)?
                .min(chunk.mapped);
            if end > limit {
                return Err(LayoutError::OutOfBounds { block, end, limit });
            }

            behind_previous = rows_before_next(rows)
                .checked_mul(stride)
                .and_then(|length| length.checked_add(behind_previous))
                .ok_or(LayoutError::Overflow)?;
            layout.planes[index] = PlaneLayout {
                block,
                offset,
                stride,
                row_bytes,
                rows,
            };
        }
        layout.count = shapes.len();
        Ok(layout)
    }

    /// A frame whose pixels lie where only a device knows: it has a size, but no planes.
    pub fn without_planes(
        format: PixelFormat,
        width: u32,
        height: u32,
    ) -> Result<Self, LayoutError> {
        if !(1..=MAX_DIMENSION).contains(&width) || !(1..=MAX_DIMENSION).contains(&height) {
            return Err(LayoutError::Size(width, height));
        }
        Ok(Self {
            format,
            width,
            height,
            origin: (0, 0),
            planes: [PlaneLayout::default(); MAX_PLANES],
            count: 0,
        })
    }

    /// The planes, as many as the format has, or none where the CPU cannot find them.
    pub fn planes(&self) -> &[PlaneLayout] {
        &self.planes[..self.count]
    }

    /// The same frame in memory that is numbered otherwise: its block n is block `which[n]` there.
    #[must_use]
    pub fn with_blocks(mut self, which: &[usize]) -> Self {
        for plane in &mut self.planes[..self.count] {
            plane.block = which[plane.block];
        }
        self
    }

    /// What the frame needs of each block, in the order of its planes.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        let mut extents: [Option<Extent>; MAX_PLANES] = [None; MAX_PLANES];
        for plane in self.planes() {
            let end = plane
                .offset
                .saturating_add(plane.rows.saturating_mul(plane.stride));
            let extent = extents[plane.block].get_or_insert(Extent {
                block: plane.block,
                start: plane.offset,
                len: 0,
            });
            // Planes of one block lie behind each other.
            extent.len = end - extent.start;
        }
        extents.into_iter().flatten()
    }

    /// Where each plane lies in the extents, one behind the other, in bytes.
    pub fn offsets_in_extents(&self) -> [usize; MAX_PLANES] {
        let mut offsets = [0; MAX_PLANES];
        if self.count == 1 {
            return offsets;
        }
        for (offset, plane) in offsets.iter_mut().zip(self.planes()) {
            for extent in self.extents() {
                if extent.block == plane.block {
                    *offset += plane.offset - extent.start;
                    break;
                }
                *offset += extent.len;
            }
        }
        offsets
    }

    /// The same frame reduced to `region` (`SPA_META_VideoCrop`).
    ///
    /// A region that is empty, reaches outside the frame, or is the whole frame leaves it as it
    /// is. Subsampled formats crop in whole chroma samples: the left and upper edges move outwards.
    #[must_use]
    pub fn crop(mut self, region: Region) -> Self {
        let (Ok(x), Ok(y)) = (u32::try_from(region.x), u32::try_from(region.y)) else {
            return self;
        };
        if (x, y, region.width, region.height) == (0, 0, self.width, self.height) {
            return self;
        }
        let fits = |from: u32, length: u32, whole: u32| {
            length > 0 && from.checked_add(length).is_some_and(|end| end <= whole)
        };
        if !fits(x, region.width, self.width) || !fits(y, region.height, self.height) {
            return self;
        }
        let shapes = self.format.planes();
        let step = shapes.iter().map(|s| s.subsampling).max().unwrap_or(1) as u32;
        let (left, top) = (x / step * step, y / step * step);
        let (width, height) = (region.width + (x - left), region.height + (y - top));
        for (plane, shape) in self.planes.iter_mut().zip(shapes) {
            // Smaller in both directions and starting within: inside the checked bounds still.
            plane.offset += top as usize / shape.subsampling * plane.stride
                + left as usize / shape.subsampling * shape.bytes_per_sample;
            plane.row_bytes = (width as usize).div_ceil(shape.subsampling) * shape.bytes_per_sample;
            plane.rows = shape.rows(height);
        }
        self.width = width;
        self.height = height;
        self.origin = (self.origin.0 + left, self.origin.1 + top);
        self
    }
}

/// Where the valid data of a block begins.
fn block_start(chunk: &Chunk) -> usize {
    match chunk.mapped {
        0 => 0,
        mapped => chunk.offset as usize % mapped,
    }
}

/// Rows from the beginning of a plane to that of the next one in the same block.
fn rows_before_next(rows: usize) -> usize {
    rows.next_multiple_of(2)
}

/// Rows of a block that holds all planes. Their strides are the same in every carried format.
fn contiguous_rows(shapes: &[PlaneShape], height: u32) -> usize {
    match shapes {
        [] => 0,
        [last] => last.rows(height),
        [first, rest @ ..] => rows_before_next(first.rows(height)) + contiguous_rows(rest, height),
    }
}

/// The stride to use: what the producer says, else what its size implies, else no padding.
fn stride(chunk: &Chunk, row_bytes: usize, rows: usize) -> Result<usize, LayoutError> {
    let stride = match usize::try_from(chunk.stride) {
        Ok(0) => {
            let size = chunk.size as usize;
            let implied = size / rows;
            if size.is_multiple_of(rows) && implied >= row_bytes {
                implied
            } else {
                row_bytes
            }
        }
        Ok(stride) => stride,
        Err(_) => return Err(LayoutError::Stride(chunk.stride, row_bytes)),
    };
    if stride < row_bytes {
        return Err(LayoutError::Stride(chunk.stride, row_bytes));
    }
    Ok(stride)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(mapped: usize, offset: u32, size: u32, stride: i32) -> Chunk {
        Chunk {
            mapped,
            offset,
            size,
            stride,
        }
    }

    fn bgrx(width: u32, height: u32, chunk: Chunk) -> Result<FrameLayout, LayoutError> {
        FrameLayout::new(PixelFormat::Bgrx, width, height, &[chunk])
    }

    #[test]
    fn a_plain_frame_is_where_it_says() {
        let layout = bgrx(4, 2, chunk(32, 0, 32, 16)).unwrap();
        assert_eq!(
            layout.planes(),
            [PlaneLayout {
                block: 0,
                offset: 0,
                stride: 16,
                row_bytes: 16,
                rows: 2
            }]
        );
    }

    #[test]
    fn padding_after_the_last_row_need_not_be_there() {
        assert!(bgrx(4, 2, chunk(36, 0, 36, 20)).is_ok());
        assert_eq!(
            bgrx(4, 2, chunk(35, 0, 36, 20)),
            Err(LayoutError::OutOfBounds {
                block: 0,
                end: 36,
                limit: 35
            })
        );
    }

    #[test]
    fn size_is_clamped_to_what_is_mapped() {
        assert!(bgrx(4, 2, chunk(32, 0, u32::MAX, 16)).is_ok());
        assert!(matches!(
            bgrx(4, 2, chunk(31, 0, u32::MAX, 16)),
            Err(LayoutError::OutOfBounds { limit: 31, .. })
        ));
    }

    #[test]
    fn a_frame_cut_short_by_its_size_is_refused() {
        assert!(matches!(
            bgrx(4, 2, chunk(4096, 0, 31, 16)),
            Err(LayoutError::OutOfBounds { limit: 31, .. })
        ));
    }

    #[test]
    fn an_offset_moves_the_frame_and_its_end() {
        assert_eq!(
            bgrx(4, 2, chunk(40, 8, 32, 16)).unwrap().planes()[0].offset,
            8
        );
        assert!(matches!(
            bgrx(4, 2, chunk(40, 12, 32, 16)),
            Err(LayoutError::OutOfBounds {
                end: 44,
                limit: 40,
                ..
            })
        ));
        // "Should be taken modulo the data maxsize."
        assert_eq!(
            bgrx(4, 2, chunk(40, 48, 32, 16)).unwrap().planes()[0].offset,
            8
        );
        assert!(bgrx(4, 2, chunk(40, u32::MAX, u32::MAX, 16)).is_err());
    }

    #[test]
    fn strides_that_would_overlap_or_run_backwards_are_refused() {
        for stride in [15, 1, -16, i32::MIN] {
            assert_eq!(
                bgrx(4, 2, chunk(4096, 0, 4096, stride)),
                Err(LayoutError::Stride(stride, 16))
            );
        }
        assert!(matches!(
            bgrx(4, 2, chunk(4096, 0, 4096, i32::MAX)),
            Err(LayoutError::OutOfBounds { .. })
        ));
    }

    #[test]
    fn a_missing_stride_follows_from_the_size() {
        assert_eq!(
            bgrx(4, 2, chunk(64, 0, 40, 0)).unwrap().planes()[0].stride,
            20
        );
        assert_eq!(
            bgrx(4, 2, chunk(64, 0, 33, 0)).unwrap().planes()[0].stride,
            16
        );
        // Luma takes 4 rows of the block, chroma 2.
        let nv12 = FrameLayout::new(PixelFormat::Nv12, 5, 3, &[chunk(48, 0, 48, 0)]).unwrap();
        assert_eq!((nv12.planes()[0].stride, nv12.planes()[1].stride), (8, 8));
    }

    #[test]
    fn absurd_sizes_are_refused_before_any_arithmetic() {
        for (width, height) in [(0, 1), (1, 0), (u32::MAX, 1), (1, MAX_DIMENSION + 1)] {
            assert_eq!(
                bgrx(width, height, chunk(4096, 0, 4096, 16)),
                Err(LayoutError::Size(width, height))
            );
        }
        assert!(matches!(
            bgrx(
                MAX_DIMENSION,
                MAX_DIMENSION,
                chunk(usize::MAX, u32::MAX, u32::MAX, i32::MAX)
            ),
            Err(LayoutError::OutOfBounds { .. } | LayoutError::Overflow)
        ));
    }

    #[test]
    fn an_empty_mapping_holds_nothing() {
        assert!(matches!(
            bgrx(1, 1, chunk(0, 7, 4, 4)),
            Err(LayoutError::OutOfBounds { .. })
        ));
        assert_eq!(
            FrameLayout::new(PixelFormat::Bgrx, 1, 1, &[]),
            Err(LayoutError::Blocks(0))
        );
    }

    #[test]
    fn nv12_comes_in_one_block_or_in_two() {
        // 6x3: luma 3 rows of 6 with stride 8, then (after 4 rows) chroma 2 rows of 6.
        let one = FrameLayout::new(PixelFormat::Nv12, 6, 3, &[chunk(48, 0, 48, 8)]).unwrap();
        assert_eq!(one.planes()[1].offset, 32);
        assert_eq!((one.planes()[1].row_bytes, one.planes()[1].rows), (6, 2));
        assert!(matches!(
            FrameLayout::new(PixelFormat::Nv12, 6, 3, &[chunk(45, 0, 45, 8)]),
            Err(LayoutError::OutOfBounds {
                end: 46,
                limit: 45,
                ..
            })
        ));

        let two = FrameLayout::new(
            PixelFormat::Nv12,
            6,
            3,
            &[chunk(24, 0, 24, 8), chunk(16, 2, 14, 8)],
        )
        .unwrap();
        assert_eq!((two.planes()[1].block, two.planes()[1].offset), (1, 2));
    }

    #[test]
    fn cropping_stays_inside() {
        let whole = bgrx(8, 4, chunk(128, 0, 128, 32)).unwrap();
        let region = |x, y, width, height| Region {
            x,
            y,
            width,
            height,
        };
        let cropped = whole.crop(region(2, 1, 3, 2));
        assert_eq!((cropped.width, cropped.height), (3, 2));
        assert_eq!(
            cropped.planes()[0],
            PlaneLayout {
                block: 0,
                offset: 40,
                stride: 32,
                row_bytes: 12,
                rows: 2
            }
        );
        for outside in [
            region(0, 0, 0, 0),
            region(-1, 0, 4, 4),
            region(6, 0, 3, 1),
            region(0, 0, 1, u32::MAX),
            region(i32::MAX, 0, u32::MAX, 1),
        ] {
            assert_eq!(whole.crop(outside), whole, "{outside:?}");
        }
    }

    #[test]
    fn extents_are_whole_rows_and_planes_are_found_in_them() {
        let extent = |block, start, len| Extent { block, start, len };
        let packed = bgrx(4, 2, chunk(128, 8, 36, 20)).unwrap();
        assert_eq!(packed.extents().collect::<Vec<_>>(), [extent(0, 8, 40)]);
        assert_eq!(packed.offsets_in_extents(), [0, 0]);
        let one = FrameLayout::new(PixelFormat::Nv12, 6, 3, &[chunk(48, 0, 48, 8)]).unwrap();
        assert_eq!(one.extents().collect::<Vec<_>>(), [extent(0, 0, 48)]);
        assert_eq!(one.offsets_in_extents(), [0, 32]);
        let two = [chunk(24, 0, 24, 8), chunk(18, 2, 16, 8)];
        let two = FrameLayout::new(PixelFormat::Nv12, 6, 3, &two).unwrap();
        let extents: Vec<_> = two.extents().collect();
        assert_eq!(extents, [extent(0, 0, 24), extent(1, 2, 16)]);
        assert_eq!(two.offsets_in_extents(), [0, 24]);
    }

    #[test]
    fn cropping_nv12_keeps_whole_chroma_samples() {
        let whole = FrameLayout::new(PixelFormat::Nv12, 8, 4, &[chunk(48, 0, 48, 8)]).unwrap();
        let cropped = whole.crop(Region {
            x: 3,
            y: 1,
            width: 3,
            height: 2,
        });
        assert_eq!((cropped.width, cropped.height), (4, 3));
        assert_eq!(cropped.planes()[0].offset, 2);
        assert_eq!(
            cropped.planes()[1],
            PlaneLayout {
                block: 0,
                offset: 34,
                stride: 8,
                row_bytes: 4,
                rows: 2
            }
        );
    }
}
