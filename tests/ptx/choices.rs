//! What the choosers return over a grid of problems.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use kaio_candle::kernel::Config;
use kaio_candle::kernel::gemm::sm80;

use crate::families::{Chooser, Extent, FAMILIES, Facts, Gpu, hash, problems};

/// A kernel that a chooser returns, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub kernel: Config,
    pub gpu: Gpu,
    pub problem: Facts,
    /// Its family's number.
    family: usize,
    /// The problem's number.
    index: usize,
}

impl Choice {
    /// Blocks that are meant to share a multiprocessor.
    pub fn blocks_per_sm(&self) -> u32 {
        self.problem.blocks_per_sm(&self.kernel)
    }

    fn family(&self) -> &'static Chooser {
        &FAMILIES[self.family]
    }

    /// What decides about resources.
    fn shape(&self) -> String {
        let kernel = match self.kernel {
            // The number of parts is a divisor of the depth, and no more.
            Config::MatmulSm80(config) => {
                Config::MatmulSm80(sm80::Config { split: config.split.min(2), ..config })
            }
            other => other,
        };
        let name = Self { kernel, ..*self }.name();
        name.split_once(", ").expect("names have two parts").0.into()
    }

    /// `sm_90a sm90 128x256 …, nt bf16→f32 …`
    pub fn name(&self) -> String {
        format!("{} {}", self.gpu.arch, self.kernel.name())
    }
}

/// Calls `each` with everything that is chosen for the problems of an extent, on all cores.
pub fn for_each_choice(extent: Extent, each: impl Fn(Choice) + Sync) {
    let problems = Mutex::new(problems(extent).enumerate());
    let next = || problems.lock().expect("nobody panicked").by_ref().take(256).collect::<Vec<_>>();
    on_all_cores(|_| {
        loop {
            let some = next();
            if some.is_empty() {
                break;
            }
            for (index, problem) in some {
                for (family, chooser) in FAMILIES.iter().enumerate() {
                    for &gpu in chooser.gpus {
                        for kernel in chooser.kernels(&problem, &gpu.device) {
                            each(Choice { kernel, gpu, problem, family, index });
                        }
                    }
                }
            }
        }
    });
}

/// Runs `work` once for each core, with its number.
pub fn on_all_cores(work: impl Fn(usize) + Sync) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for i in 0..cores {
            let work = &work;
            scope.spawn(move || work(i));
        }
    });
}

/// Everything different that is chosen, by name: each shape, with a sample of its layouts, types,
/// biases and activations.
pub fn choices(extent: Extent) -> BTreeMap<String, Choice> {
    let found = Mutex::new(HashMap::new());
    for_each_choice(extent, |choice| {
        let mut found = found.lock().expect("nobody panicked");
        let first = found.entry((choice.kernel, choice.gpu.arch)).or_insert(choice);
        // Whichever core was faster.
        if choice.index < first.index {
            *first = choice;
        }
    });
    let mut named = BTreeMap::new();
    for choice in found.into_inner().expect("nobody panicked").into_values() {
        let name = choice.name();
        if named.insert(name.clone(), choice).is_some() {
            panic!("two kernels are called {name}");
        }
    }
    let mut shapes: BTreeMap<String, Vec<&String>> = BTreeMap::new();
    for (name, choice) in &named {
        shapes.entry(choice.shape()).or_default().push(name);
    }
    let mut chosen = BTreeMap::new();
    for names in shapes.into_values() {
        let some = named[names[0]].family().of_a_shape;
        for name in spread(names, |name| name.to_string()).take(some) {
            let choice = named[name];
            chosen.extend(variants(name, &choice));
            chosen.insert(name.clone(), choice);
        }
    }
    chosen
}

/// In an order that shows much at once: first those with a word in their names that none before had.
pub fn spread<T>(mut items: Vec<T>, name: impl Fn(&T) -> String) -> impl Iterator<Item = T> {
    items.sort_by_key(|item| hash(&name(item)));
    let mut seen = HashSet::new();
    let (first, others): (Vec<_>, Vec<_>) = items.into_iter().partition(|item| {
        name(item).split(' ').filter(|word| seen.insert(word.to_string())).count() > 0
    });
    first.into_iter().chain(others)
}

/// What is chosen for the problem's variants.
fn variants(name: &str, choice: &Choice) -> Vec<(String, Choice)> {
    let problems = choice.problem.variants(name, &choice.kernel);
    let chosen = problems.into_iter().flat_map(|problem| {
        let kernels = choice.family().kernels(&problem, &choice.gpu.device);
        kernels.into_iter().map(move |kernel| Choice { kernel, problem, ..*choice })
    });
    chosen.map(|choice| (choice.name(), choice)).collect()
}

/// A choice that cannot be built, or not launched.
#[test]
fn choices_fit_their_problems() {
    for_each_choice(Extent::Few, |choice| {
        let Choice { kernel, gpu, problem, .. } = &choice;
        if let Err(why) = problem.fits(kernel, gpu) {
            panic!("{why}: {} for {problem:?}", choice.name());
        }
    });
}
