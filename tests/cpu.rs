//! All suites on the CPU, the recipes of docs/recipes.md, and what must not compile.

#[path = "cpu/recipes.rs"]
mod recipes;
mod suites;
#[path = "suites/tables.rs"]
mod tables;

use candle_core::Device;

/// What the suites run on.
fn device() -> Option<Device> {
    Some(Device::Cpu)
}

/// Devices whose tensors no call takes beside [`device`]'s.
fn other_devices() -> Vec<Device> {
    vec![]
}

/// What would bind the crate to today's methods and options.
///
/// After a compiler's change of wording, `TRYBUILD=overwrite cargo test --test cpu must_not_compile`
/// writes the expected texts anew.
#[test]
fn must_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
