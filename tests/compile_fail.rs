//! What must not compile: it would bind the crate to today's methods and options.
//!
//! After a compiler's change of wording, `TRYBUILD=overwrite cargo test --test compile_fail` writes
//! the expected texts anew.

#[test]
fn sealed_and_non_exhaustive() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
