//! The arguments of a launch.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::mem::MaybeUninit;

use super::tensor_map::TensorMap;
use crate::ptx::Scalar;

pub(super) fn list<T: ToString>(sizes: &[T]) -> String {
    sizes.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

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
    bytes: Bytes,
    /// Where each argument begins, and its size. Of these and the bytes only what was pushed is
    /// initialised: a launch has a handful.
    places: [MaybeUninit<(u16, u16)>; MOST],
    count: usize,
    used: usize,
    /// One did not fit.
    full: bool,
}

/// Aligned as the largest of arguments, a descriptor, wants it.
#[repr(align(128))]
struct Bytes([MaybeUninit<u8>; MOST_BYTES]);

impl Default for Args {
    fn default() -> Self {
        Self::new()
    }
}

impl Args {
    /// No arguments.
    pub fn new() -> Self {
        let bytes = Bytes([MaybeUninit::uninit(); MOST_BYTES]);
        let places = [MaybeUninit::uninit(); MOST];
        Self { bytes, places, count: 0, used: 0, full: false }
    }

    fn push<T: Copy>(&mut self, value: T) -> &mut Self {
        const { assert!(align_of::<T>() <= align_of::<Bytes>()) };
        let (offset, size) = (self.used.next_multiple_of(align_of::<T>()), size_of::<T>());
        if self.count == MOST || offset + size > MOST_BYTES {
            self.full = true;
            return self;
        }
        // SAFETY: that many bytes are there, aligned: the offset is a multiple of the type's alignment
        // from an address that is a multiple of at least that.
        unsafe { self.bytes.0.as_mut_ptr().add(offset).cast::<T>().write(value) };
        // Both are at most MOST_BYTES.
        self.places[self.count].write((offset as u16, size as u16));
        self.count += 1;
        self.used = offset + size;
        self
    }

    /// A number.
    pub fn value<T: Scalar>(&mut self, value: T) -> &mut Self {
        self.push(value)
    }

    /// An address in the GPU's memory: [`Memory::address`](super::launch::Memory::address),
    /// [`Memory::at`](super::launch::Memory::at).
    pub fn pointer(&mut self, address: u64) -> &mut Self {
        self.push(address)
    }

    /// A TMA descriptor.
    pub fn tensor_map(&mut self, map: TensorMap) -> &mut Self {
        self.push(map.raw())
    }

    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        self.places[..self.count].iter().map(|place| {
            // SAFETY: the first `count` were written.
            let (offset, size) = unsafe { place.assume_init() };
            (offset.into(), size.into())
        })
    }

    /// Whether they have these sizes.
    pub(super) fn are(&self, params: &[usize]) -> bool {
        !self.full && self.places().map(|(_, size)| size).eq(params.iter().copied())
    }

    pub(super) fn show(&self) -> String {
        match self.full {
            true => format!("more than {MOST} arguments or {MOST_BYTES} bytes"),
            false => {
                format!("{} bytes", list(&self.places().map(|(_, size)| size).collect::<Vec<_>>()))
            }
        }
    }

    /// Where each argument is. The driver only reads.
    pub(super) fn pointers(&self) -> [*mut c_void; MOST] {
        let mut pointers = [std::ptr::null_mut(); MOST];
        for (pointer, (offset, _)) in pointers.iter_mut().zip(self.places()) {
            *pointer = self.bytes.0[offset..].as_ptr().cast_mut().cast();
        }
        pointers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_lie_where_they_are_pointed_at() {
        let mut args = Args::new();
        args.value(7u32).pointer(0x1234_5678_9abc).value(9u16).value(-2i32).value(0.5f32);
        assert!(args.are(&[4, 8, 2, 4, 4]));
        assert!(!args.are(&[4, 8, 2, 4]) && !args.are(&[4, 8, 2, 4, 4, 4]));
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
        for _ in 0..MOST {
            args.value(1u64);
        }
        assert!(args.are(&[8; MOST]));
        args.value(1u64);
        assert!(!args.are(&[8; MOST]) && !args.are(&[8; MOST + 1]));
        assert_eq!(args.show(), "more than 64 arguments or 4096 bytes");
    }
}
