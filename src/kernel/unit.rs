//! Elements side by side, which a thread loads and stores together, in f32.

use super::Element;
use crate::ptx::{Address, Kernel, Reg};

/// `unit` elements from an address on, that is a multiple of what is loaded at once: 16 bytes at most.
pub(super) fn load<'k>(
    k: &'k Kernel,
    element: Element,
    unit: u32,
    from: impl Into<Address<'k, u64>>,
) -> Vec<Reg<'k, f32>> {
    let from = from.into();
    match (element, unit) {
        (Element::F32, 1) => k.ld_global_nc::<f32, 1>(from).to_vec(),
        (Element::F32, 2) => k.ld_global_nc::<f32, 2>(from).to_vec(),
        (Element::F32, _) => (0..unit / 4)
            .flat_map(|quad| k.ld_global_nc::<f32, 4>(from.at(16 * i64::from(quad))))
            .collect(),
        (Element::Half(half), 1) => {
            let [value] = k.ld_global_nc::<u16, 1>(from);
            vec![k.widen(half, value)]
        }
        (Element::Half(half), _) => {
            let pairs = match unit {
                2 => k.ld_global_nc::<u32, 1>(from).to_vec(),
                4 => k.ld_global_nc::<u32, 2>(from).to_vec(),
                _ => k.ld_global_nc::<u32, 4>(from).to_vec(),
            };
            pairs.into_iter().flat_map(|pair| k.unpack(half, pair)).collect()
        }
    }
}

/// The same, rounded.
pub(super) fn store<'k>(
    k: &'k Kernel,
    element: Element,
    to: impl Into<Address<'k, u64>>,
    values: &[Reg<'k, f32>],
) {
    let to = to.into();
    match (element, values) {
        (Element::F32, &[x]) => k.st_global(to, [x]),
        (Element::F32, _) => {
            for (quad, values) in values.chunks(4).enumerate() {
                let &[a, b, c, d] = values else {
                    unreachable!("a unit is one element or 16 bytes")
                };
                k.st_global(to.at(16 * quad as i64), [a, b, c, d]);
            }
        }
        (Element::Half(half), &[x]) => k.st_global(to, [k.cvt_rn(half, x)]),
        (Element::Half(half), &[a, b, c, d, e, f, g, h]) => {
            let pairs = [[a, b], [c, d], [e, f], [g, h]];
            k.st_global(to, pairs.map(|[low, high]| k.cvt_rn_x2(half, low, high)));
        }
        _ => unreachable!("a unit is one element or 16 bytes"),
    }
}
