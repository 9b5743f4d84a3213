//! What kernels declare and what launches pass is the same, by name and type, for all that is chosen.

use std::collections::HashMap;

use crate::choices::{Choice, choices};
use crate::families::{self, Extent, Used};

/// Each parameter that kernels declare has a value of its type, descriptors are what the driver takes,
/// and no name is nobody's.
#[test]
fn launches_pass_what_kernels_declare() {
    let mut used: HashMap<_, Used> = HashMap::new();
    for (name, Choice { kernel, gpu, problem, .. }) in choices(Extent::Few) {
        let asked = problem.passes(&gpu.device, &kernel, used.entry(problem.names()).or_default());
        asked.unwrap_or_else(|why| panic!("{name}: {why} for {problem:?}"));
    }
    for (table, names) in families::params() {
        let none = Used::new();
        let used = used.get(table).unwrap_or(&none);
        let unused: Vec<_> = names.iter().filter(|name| !used.contains(*name)).collect();
        assert!(unused.is_empty(), "no kernel declares {unused:?} of {table}");
    }
}
