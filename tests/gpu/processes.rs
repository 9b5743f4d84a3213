//! What the environment decides when a process starts, and what bears no company: each test runs this
//! binary again, for one of the ignored tests at the end.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::{env, fs, thread};

use candle_core::{DType, Device, Tensor};
use kaio_candle::launch::{Function, Kernels, kernels};
use kaio_candle::prelude::*;
use kaio_candle::ptx::{Kernel, Target};

use super::streams::bits;
use super::suites::{Layout, Source, matmul};
use super::{gpu, graphs, memory, say};

const CHILD: &str = "KAIO_TEST_CHILD";

/// What a child says in its own words: lines `child: key value`.
type Said = BTreeMap<String, String>;

/// Runs one of the tests at the end in a process of its own.
fn child(test: &str, variables: &[(&str, &OsStr)]) -> Said {
    let mut command = Command::new(env::current_exe().expect("this binary"));
    command.args([&format!("processes::{test}"), "--exact", "--ignored", "--nocapture"]);
    for variable in ["KAIO_ARCH", "KAIO_CACHE_DIR", "KAIO_DUMP_PTX"] {
        command.env_remove(variable);
    }
    command.env(CHILD, "1").envs(variables.iter().copied());
    let output = command.output().expect("it starts");
    let text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    let text = text.concat();
    assert!(output.status.success(), "{test} with {variables:?} failed:\n{text}");
    assert!(text.contains("1 passed"), "{test} did not run:\n{text}");
    for line in text.lines().filter(|line| line.starts_with("suite ")) {
        say(&format!("[{test}] {line}"));
    }
    let said = text.lines().filter_map(|line| line.split_once("child: ")?.1.split_once(' '));
    said.map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

/// Whether this process is a child; the tests at the end do nothing else.
fn is_child() -> bool {
    env::var_os(CHILD).is_some()
}

fn tell(key: &str, value: impl std::fmt::Display) {
    say(&format!("child: {key} {value}"));
}

/// An empty directory, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("kaio-candle-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a directory for temporary files");
        Self(path)
    }

    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let entries = fs::read_dir(&self.0).expect("the directory is there");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        paths.map(|path| (path.clone(), fs::read(path).expect("a file"))).collect()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_kernel_is_compiled_once() {
    if gpu().is_none() {
        return;
    }
    let dump = Scratch::new("dump");
    let said = child("eight_threads_at_once", &[("KAIO_DUMP_PTX", dump.0.as_os_str())]);
    let (texts, compiled) = (dump.files().len(), &said["compiled"]);
    assert!(texts >= 2, "a product's kernel and one of the test's own");
    assert_eq!(&texts.to_string(), compiled, "each text is compiled once");
    say(&format!(
        "suite native processes: 8 threads at once, {compiled} kernels compiled once each"
    ));
}

type Damage = fn(&[u8]) -> Vec<u8>;

fn middle(file: &[u8]) -> Vec<u8> {
    let (mut file, len) = (file.to_vec(), file.len());
    file[len / 2..][..len / 4].fill(0x55);
    file
}

#[test]
fn compiled_kernels_are_kept_on_disk() {
    if gpu().is_none() {
        return;
    }
    let cache = Scratch::new("cache");
    let run = |directory: &Path| {
        let said = child("a_product", &[("KAIO_CACHE_DIR", directory.as_os_str())]);
        let count = |key: &str| said[key].parse::<usize>().expect("a number");
        (
            Kernels { compiled: count("compiled"), from_disk: count("from_disk") },
            said["bits"].clone(),
        )
    };
    let (first, want) = run(&cache.0);
    let (files, count) = (cache.files(), first.compiled);
    assert!(count > 0 && first.from_disk == 0, "{first:?}");
    assert_eq!(files.len(), count, "a file for each kernel, and nothing else: {:?}", files.keys());
    let (from_disk, compiled) =
        (Kernels { from_disk: count, compiled: 0 }, Kernels { compiled: count, from_disk: 0 });
    assert_eq!(run(&cache.0), (from_disk, want.clone()), "the second process");

    let damages: [(&str, Damage); 4] = [
        ("empty", |_| Vec::new()),
        ("garbage", |_| b"not a kernel".to_vec()),
        ("cut", |file| file[..file.len() / 2].to_vec()),
        ("overwritten", middle),
    ];
    for (name, damage) in damages {
        files.iter().for_each(|(path, file)| fs::write(path, damage(file)).expect("written"));
        assert_eq!(run(&cache.0), (compiled, want.clone()), "{name}: compiled anew");
        assert_eq!(run(&cache.0), (from_disk, want.clone()), "{name}: and replaced");
    }
    let file = files.keys().next().expect("there is one");
    assert_eq!(run(&file.join("below a file")), (compiled, want), "no directory: silent");
    say("suite native processes: kernels kept on disk, found, and replaced when damaged");
}

#[test]
fn the_portable_kernels() {
    if gpu().is_none() {
        return;
    }
    let dump = Scratch::new("portable");
    let variables = [("KAIO_ARCH", OsStr::new("sm_80")), ("KAIO_DUMP_PTX", dump.0.as_os_str())];
    child("tables_of_matmul", &variables);
    let files = dump.files();
    for (path, text) in &files {
        let text = String::from_utf8_lossy(text);
        assert!(text.contains("\n.target sm_80\n"), "{path:?} is for another target");
    }
    assert!(!files.is_empty(), "the native engine compiled nothing");
    say(&format!("suite native processes: {} portable kernels on this GPU", files.len()));
}

#[test]
fn graphs_capture_and_replay() {
    if gpu().is_some() {
        child("graphs", &[]);
    }
}

#[test]
fn memory_of_attention() {
    if gpu().is_some() {
        child("attention_alone", &[]);
        child("attention_alone", &[("KAIO_ARCH", OsStr::new("sm_80"))]);
    }
}

#[test]
fn memory_of_weights() {
    if gpu().is_some() {
        child("weights_alone", &[]);
    }
}

#[test]
fn an_unknown_architecture_is_an_error() {
    if gpu().is_none() {
        return;
    }
    let said = child("an_error", &[("KAIO_ARCH", OsStr::new("sm_70"))]);
    let best = match said["capability"].as_str() {
        "(9, 0)" => "sm_90a or sm_89 or sm_80",
        "(8, 0)" | "(8, 6)" | "(8, 7)" => "sm_80",
        _ => "sm_89 or sm_80",
    };
    assert_eq!(
        said["error"],
        format!(
            "kaio_matmul_with: `KAIO_ARCH` is sm_70, wanted {best} on this GPU; unset the \
             environment variable, and the first is taken"
        )
    );
}

/// What is compiled for a GPU outlives the devices that it was first compiled for.
#[test]
fn one_device_after_the_other() {
    if gpu().is_some() {
        child("devices_in_turn", &[]);
    }
}

fn product(device: &Device) -> Tensor {
    let mut source = Source::new("a product", device);
    let a = source.tensor(DType::F16, &[80, 96], Layout::Plain).unwrap();
    let b = source.tensor(DType::F16, &[96, 72], Layout::Plain).unwrap();
    let opts = MatmulOptions::default().out_dtype(DType::F16).engine(Engine::Native);
    a.kaio_matmul_with(&b, &opts).unwrap()
}

fn tell_kernels() {
    let Kernels { compiled, from_disk } = kernels();
    tell("compiled", compiled);
    tell("from_disk", from_disk);
}

#[test]
#[ignore = "run in a process of its own"]
fn a_product() {
    let (true, Some(gpu)) = (is_child(), gpu()) else { return };
    let hash = |sum: u64, bits: u32| (sum ^ u64::from(bits)).wrapping_mul(0x100_0000_01b3);
    tell("bits", bits(&product(&gpu)).into_iter().fold(7, hash));
    tell_kernels();
}

#[test]
#[ignore = "run in a process of its own"]
fn devices_in_turn() {
    if !is_child() {
        return;
    }
    // Nothing else in this process holds the GPU's context: it goes with each device.
    let all = [0; 3].map(|_| bits(&product(&Device::new_cuda(0).unwrap())));
    assert!(all.iter().all(|bits| bits == &all[0]));
    let Kernels { compiled, from_disk } = kernels();
    assert_eq!((compiled, from_disk), (1, 0), "the product's kernel, for all of them");
}

#[test]
#[ignore = "run in a process of its own"]
fn eight_threads_at_once() {
    let (true, Some(gpu)) = (is_child(), gpu()) else { return };
    let start = Barrier::new(8);
    let own = Kernel::new("own", Target::Sm80, 32).finish();
    let ask = || {
        let device = gpu.as_cuda_device().unwrap();
        start.wait();
        let function = Function::compile(device, &own).unwrap();
        start.wait();
        (function, bits(&product(&gpu)))
    };
    let all: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(all.iter().all(|(function, _)| Arc::ptr_eq(function, &all[0].0)));
    assert!(all.iter().all(|(_, bits)| bits == &all[0].1));
    tell_kernels();
}

#[test]
#[ignore = "run in a process of its own"]
fn tables_of_matmul() {
    let (true, Some(gpu)) = (is_child(), gpu()) else { return };
    matmul::sizes(&gpu);
    matmul::empty(&gpu);
    matmul::layouts(&gpu);
    matmul::specials(&gpu);
    matmul::random(&gpu);
    matmul::gradients(&gpu);
    matmul::scaled_gradients(&gpu);
    matmul::training(&gpu);
    matmul::biases(&gpu);
    matmul::activations(&gpu);
    matmul::activated_specials(&gpu);
    matmul::epilogue_gradients(&gpu);
    matmul::some_random_products(&gpu, 500, 700);
}

#[test]
#[ignore = "run in a process of its own"]
fn graphs() {
    let (true, Some(_)) = (is_child(), gpu()) else { return };
    graphs::capture_and_replay().unwrap();
}

#[test]
#[ignore = "run in a process of its own"]
fn attention_alone() {
    let (true, Some(_)) = (is_child(), gpu()) else { return };
    memory::of_attention().unwrap();
}

#[test]
#[ignore = "run in a process of its own"]
fn weights_alone() {
    let (true, Some(_)) = (is_child(), gpu()) else { return };
    memory::of_weights().unwrap();
}

#[test]
#[ignore = "run in a process of its own"]
fn an_error() {
    let (true, Some(gpu)) = (is_child(), gpu()) else { return };
    let stream = gpu.as_cuda_device().unwrap().cuda_stream();
    tell("capability", format!("{:?}", stream.context().compute_capability().unwrap()));
    let a = Tensor::zeros((16, 16), DType::F16, &gpu).unwrap();
    let opts = MatmulOptions::default().engine(Engine::Native);
    // Each call says it: the first left no trace.
    let errors = [0; 2].map(|_| a.kaio_matmul_with(&a, &opts).unwrap_err().to_string());
    assert_eq!(errors[0], errors[1]);
    tell("error", &errors[0]);
}
