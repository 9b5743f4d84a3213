//! What must not compile: it would bind the crate to today's methods and options.

#[test]
fn sealed_and_non_exhaustive() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
