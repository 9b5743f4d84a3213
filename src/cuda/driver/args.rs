//! The arguments of a launch.

use std::ffi::c_void;

use super::tensor_map::TensorMap;
use crate::ptx::{Param, Scalar};

/// Most parameters of a kernel, and their bytes: what every GPU and driver take.
const MOST: usize = 64;
const MOST_BYTES: usize = 4096;

/// The arguments of a launch by value, in the order of the kernel's parameters.
///
/// ```
/// use kaio_candle::launch::Args;
///
/// // In place:
/// # fn launch(_: &Args) {}
/// # let address = 0;
/// launch(Args::new().pointer(address).value(640u32).value(0.5f32));
/// // Or step by step:
/// let mut args = Args::new();
/// args.pointer(address);
/// args.value(640u32);
/// launch(&args);
/// ```
pub struct Args {
    words: Words,
    /// The word in which each argument begins, and its bytes.
    places: [(u16, u16); MOST],
    count: usize,
    /// Words.
    used: usize,
    /// Bytes of all.
    bytes: usize,
    /// One did not fit.
    full: bool,
}

/// A number has a word of its own, a descriptor as many as it takes. Aligned as descriptors are.
#[repr(align(64))]
struct Words([u64; MOST_BYTES / WORD + MOST]);

const WORD: usize = size_of::<u64>();

// The driver copies a parameter's first bytes from where its argument begins.
const _: () = assert!(cfg!(target_endian = "little"));

impl Default for Args {
    fn default() -> Self {
        Self::new()
    }
}

impl Args {
    /// No arguments.
    pub fn new() -> Self {
        let words = Words([0; MOST_BYTES / WORD + MOST]);
        Self { words, places: [(0, 0); MOST], count: 0, used: 0, bytes: 0, full: false }
    }

    fn push(&mut self, words: &[u64], bytes: usize) -> &mut Self {
        // The parameters lie aligned to their sizes, descriptors to 64 bytes.
        let align = bytes.min(64);
        let (first, end) = (self.used.next_multiple_of(align.div_ceil(WORD)), self.bytes);
        let end = end.next_multiple_of(align) + bytes;
        if self.count == MOST || end > MOST_BYTES {
            self.full = true;
            return self;
        }
        self.words.0[first..][..words.len()].copy_from_slice(words);
        // Both are at most MOST_BYTES.
        self.places[self.count] = (first as u16, bytes as u16);
        self.count += 1;
        (self.used, self.bytes) = (first + words.len(), end);
        self
    }

    /// A number.
    pub fn value<T: Scalar>(&mut self, value: T) -> &mut Self {
        self.push(&[value.bits()], T::SIZE)
    }

    /// An address in the GPU's memory: [`Memory::address`](super::memory::Memory::address),
    /// [`Memory::at`](super::memory::Memory::at).
    pub fn pointer(&mut self, address: u64) -> &mut Self {
        self.value(address)
    }

    /// A TMA descriptor.
    pub fn tensor_map(&mut self, map: TensorMap) -> &mut Self {
        let words = map.raw().opaque;
        self.push(&words, size_of_val(&words))
    }

    fn sizes(&self) -> impl Iterator<Item = usize> {
        self.places[..self.count].iter().map(|&(_, bytes)| bytes.into())
    }

    /// Whether they have the sizes of these parameters.
    pub(super) fn fit(&self, params: &[Param]) -> bool {
        !self.full && self.sizes().eq(params.iter().map(|param| param.kind.size()))
    }

    pub(super) fn show(&self) -> String {
        match self.full {
            true => format!("more than {MOST} arguments or {MOST_BYTES} bytes"),
            false => format!("{} bytes", list(self.sizes())),
        }
    }

    /// Where each argument is. The driver only reads.
    pub(super) fn pointers(&self) -> [*mut c_void; MOST] {
        let mut pointers = [std::ptr::null_mut(); MOST];
        for (pointer, &(first, _)) in pointers.iter_mut().zip(&self.places[..self.count]) {
            *pointer = self.words.0[first.into()..].as_ptr().cast_mut().cast();
        }
        pointers
    }
}

/// Sizes of parameters, for people.
pub fn list(sizes: impl IntoIterator<Item = usize>) -> String {
    sizes.into_iter().map(|size| size.to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::ParamKind;

    fn params(kinds: &[ParamKind]) -> Vec<Param> {
        kinds.iter().map(|&kind| Param { name: String::new(), kind }).collect()
    }

    #[test]
    #[allow(unsafe_code)]
    fn arguments_lie_where_they_are_pointed_at() {
        let mut args = Args::new();
        args.value(7u32).pointer(0x1234_5678_9abc).value(9u16).value(-2i32).value(0.5f32);
        let mut kinds = vec![
            ParamKind::value::<u32>(),
            ParamKind::Pointer,
            ParamKind::value::<u16>(),
            ParamKind::value::<i32>(),
            ParamKind::value::<f32>(),
        ];
        assert!(args.fit(&params(&kinds)) && !args.fit(&params(&kinds[..4])));
        kinds.push(ParamKind::value::<f32>());
        assert!(!args.fit(&params(&kinds)));
        let pointers = args.pointers();
        // SAFETY: each points to an aligned argument of this type.
        unsafe {
            assert_eq!(*pointers[0].cast::<u32>(), 7);
            assert_eq!(*pointers[1].cast::<u64>(), 0x1234_5678_9abc);
            assert_eq!(*pointers[2].cast::<u16>(), 9);
            assert_eq!(*pointers[3].cast::<i32>(), -2);
            assert_eq!(*pointers[4].cast::<f32>(), 0.5);
        }
        assert!(pointers[5..].iter().all(|pointer| pointer.is_null()));
    }

    #[test]
    fn too_many_arguments_are_no_kernels() {
        let mut args = Args::new();
        let most = params(&[ParamKind::Pointer; MOST]);
        for _ in 0..MOST {
            args.value(1u64);
        }
        assert!(args.fit(&most));
        args.value(1u64);
        assert!(!args.fit(&most) && !args.fit(&params(&[ParamKind::Pointer; MOST + 1])));
        assert_eq!(args.show(), "more than 64 arguments or 4096 bytes");
    }

    #[test]
    fn descriptors_are_aligned_and_counted_in_bytes() {
        let mut args = Args::new();
        args.value(1u16).push(&[2; 16], 128).value(3u32).push(&[4; 16], 128);
        let pointers = args.pointers();
        assert!([1, 3].iter().all(|&i| pointers[i].addr().is_multiple_of(64)));
        let map = ParamKind::TensorMap;
        let kinds = [ParamKind::value::<u16>(), map, ParamKind::value::<u32>(), map];
        assert!(args.fit(&params(&kinds)));
        let mut maps = Args::new();
        for _ in 0..MOST_BYTES / 128 {
            maps.push(&[0; 16], 128);
        }
        assert!(maps.fit(&params(&[map; MOST_BYTES / 128])));
        maps.value(1u16);
        assert_eq!(maps.show(), "more than 64 arguments or 4096 bytes");
    }
}
