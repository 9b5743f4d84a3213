//! Golden texts and digests: a change of what is emitted shows up as a change of these files.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use kaio_candle::Activation;
use kaio_candle::kernel::gemm::{Epilogue, Major, sm80, sm90};
use kaio_candle::kernel::{Config, Element, attention, glu};
use kaio_candle::ptx::{Half, Source};

use crate::digest::digest;
use crate::{RATCHET, golden_folder, instructions, set};

const BF16: Element = Element::Half(Half::Bf16);
const F16: Element = Element::Half(Half::F16);
const PLAIN: Epilogue = Epilogue { out: BF16, bias: None, activation: None };

/// Hopper: `nn`, 64×64.
const HOPPER: sm90::Config = sm90::Config {
    elements: [BF16; 2],
    lhs: Major::K,
    rhs: Major::Outer,
    orient: sm90::Orient::Plain,
    rows: 64,
    cols: 64,
    lhs_lines: 64,
    rhs_lines: 64,
    stages: 4,
    split: 1,
    pingpong: false,
    store_stages: 2,
    order: sm90::Order::Grid,
    blocks_per_sm: 1,
    batched: false,
    store: sm90::Store::Tma,
    epilogue: PLAIN,
};

/// Everywhere: `nn`, 64×64.
const PORTABLE: sm80::Config = sm80::Config {
    elements: [BF16; 2],
    lhs: Major::K,
    rhs: Major::Outer,
    rows: 64,
    cols: 64,
    depth: 64,
    warps: [2, 2],
    stages: 4,
    split: 1,
    blocks_per_sm: 3,
    batched: false,
    unit: 4,
    epilogue: PLAIN,
};

/// 64 wide, nothing hidden.
const VARIANT: attention::Variant = attention::Variant {
    out: BF16,
    head_dim: 64,
    value_dim: 64,
    mask: attention::Mask::None,
    score_mod: attention::ScoreMod { scale_first: false, softcap: false, bias: None, alibi: false },
    lengths: attention::Lengths::Full,
    pack: 1,
    split: false,
    lse: true,
};

/// Attention on Hopper: 128×32.
const FLASH: attention::sm90::Config = attention::sm90::Config {
    variant: VARIANT,
    element: BF16,
    rows: 128,
    keys: 32,
    query_stages: 1,
    stages: 2,
    store_stages: 1,
    pingpong: true,
    store: attention::sm90::Store::Tma,
};

/// Attention everywhere: 128×32.
const PORTABLE_FLASH: attention::sm80::Config = attention::sm80::Config {
    variant: VARIANT,
    element: BF16,
    warps: 4,
    m16_tiles: 2,
    keys: 32,
    blocks_per_sm: 2,
    q_in_regs: true,
};

/// What variants show: all that changes scores, packed sequences, keys in parts.
fn variants(bias: attention::Bias) -> [attention::Variant; 3] {
    use attention::{Lengths, Mask, ScoreMod};
    let small = attention::Variant { head_dim: 16, value_dim: 8, ..VARIANT };
    let scores = ScoreMod { softcap: true, alibi: true, bias: Some(bias), ..VARIANT.score_mod };
    [
        attention::Variant {
            mask: Mask::Window,
            score_mod: scores,
            lengths: Lengths::Padded,
            ..small
        },
        attention::Variant {
            out: Element::F32,
            value_dim: 72,
            mask: Mask::Right,
            lengths: Lengths::Packed,
            ..small
        },
        attention::Variant { out: Element::F32, pack: 4, split: true, ..small },
    ]
}

fn flash() -> [(&'static str, Config); 5] {
    use attention::sm90::{Config as Flash, Store};
    let [all, packed, split] = variants(attention::Bias { element: BF16, pairs: true });
    let small = Flash { rows: 64, keys: 16, pingpong: false, ..FLASH };
    let all = Flash { variant: all, ..small };
    let packed = Flash { variant: packed, element: F16, store_stages: 2, ..small };
    let split = Flash { variant: split, store: Store::Direct, store_stages: 0, ..small };
    let combine = attention::combine::Config::new(BF16, 8, 5, true);
    [
        ("flash90_plain", Config::FlashSm90(Flash { query_stages: 2, ..FLASH })),
        ("flash90_window_all", Config::FlashSm90(all)),
        ("flash90_packed", Config::FlashSm90(packed)),
        ("flash90_split", Config::FlashSm90(split)),
        ("flash_combine", Config::FlashCombine(combine)),
    ]
}

fn portable_flash() -> [(&'static str, Config); 5] {
    use attention::sm80::Config as Flash;
    let [all, packed, split] = variants(attention::Bias { element: Element::F32, pairs: false });
    let small = Flash { m16_tiles: 1, keys: 16, ..PORTABLE_FLASH };
    let all = Flash { variant: all, q_in_regs: false, ..small };
    let packed = attention::Variant { head_dim: 20, ..packed };
    let packed = Flash { variant: packed, element: F16, ..small };
    let split = Flash { variant: split, ..small };
    let exact = attention::Variant {
        out: Element::F32,
        head_dim: 12,
        value_dim: 40,
        mask: attention::Mask::Right,
        ..VARIANT
    };
    let exact = Flash { variant: exact, element: Element::F32, q_in_regs: false, ..small };
    [
        ("flash80_plain", Config::FlashSm80(PORTABLE_FLASH)),
        ("flash80_window_all", Config::FlashSm80(all)),
        ("flash80_packed", Config::FlashSm80(packed)),
        ("flash80_split", Config::FlashSm80(split)),
        ("flash80_exact", Config::FlashSm80(exact)),
    ]
}

/// Kernels that together show all that the emitters have, small where size shows nothing.
pub fn kernels() -> Vec<(&'static str, Config)> {
    use sm90::{Order, Orient, Store};
    let f32_out = Epilogue { out: Element::F32, ..PLAIN };
    let after =
        |bias, activation| Epilogue { bias: Some(bias), activation: Some(activation), ..PLAIN };
    let swapped = sm90::Config {
        lhs: Major::Outer,
        rhs: Major::K,
        orient: Orient::Swapped,
        cols: 8,
        rhs_lines: 8,
        split: 2,
        stages: 10,
        blocks_per_sm: 2,
        store: Store::Staged { unit: 4 },
        ..HOPPER
    };
    let odd = sm90::Config {
        elements: [F16; 2],
        cols: 16,
        rhs_lines: 16,
        batched: true,
        store: Store::Staged { unit: 1 },
        epilogue: Epilogue { bias: Some(Element::F32), ..f32_out },
        ..HOPPER
    };
    let turns = sm90::Config { rows: 128, pingpong: true, order: Order::Raster, ..HOPPER };
    let hopper = [
        ("sm90_large", sm90::Config { rows: 128, cols: 256, ..HOPPER }),
        (
            "sm90_f32_batched",
            sm90::Config { order: Order::Raster, batched: true, epilogue: f32_out, ..HOPPER },
        ),
        ("sm90_decode", swapped),
        ("sm90_split", sm90::Config { split: 2, store: Store::Staged { unit: 4 }, ..HOPPER }),
        ("sm90_pingpong", turns),
        (
            "sm90_pingpong_columns",
            sm90::Config {
                orient: Orient::Swapped,
                epilogue: Epilogue { bias: Some(BF16), ..f32_out },
                ..turns
            },
        ),
        ("sm90_bias_gelu", sm90::Config { epilogue: after(BF16, Activation::GeluErf), ..HOPPER }),
        ("sm90_odd_batched", odd),
    ];
    let large =
        sm80::Config { rows: 128, cols: 128, depth: 32, stages: 3, blocks_per_sm: 2, ..PORTABLE };
    let small = sm80::Config {
        rows: 32,
        cols: 32,
        depth: 32,
        epilogue: after(BF16, Activation::Silu),
        ..PORTABLE
    };
    let split = sm80::Config {
        elements: [F16; 2],
        lhs: Major::Outer,
        rhs: Major::K,
        rows: 16,
        cols: 128,
        warps: [1, 4],
        split: 4,
        blocks_per_sm: 2,
        batched: true,
        unit: 1,
        epilogue: after(Element::F32, Activation::GeluTanh),
        ..PORTABLE
    };
    let portable = [("sm80_large", large), ("sm80_silu", small), ("sm80_split_batched", split)];
    let reduce = split.reduce().expect("it is split");
    let hopper = hopper.into_iter().map(|(name, config)| (name, Config::MatmulSm90(config)));
    let portable = portable.into_iter().map(|(name, config)| (name, Config::MatmulSm80(config)));
    let reduce = [("sm80_reduce", Config::MatmulReduce(reduce))];
    let glu = glu::Config {
        element: BF16,
        gate: glu::Gate::GeluTanh,
        backward: true,
        unit: 8,
        across: 256,
    };
    let glu = [("glu_backward", Config::Glu(glu))];
    let products = hopper.chain(portable).chain(reduce);
    products.chain(flash()).chain(portable_flash()).chain(glu).collect()
}

/// The text, after what a launch must match.
fn with_facts(title: &str, source: &Source) -> String {
    let Source { entry, threads, shared, cluster, starts_early, params, .. } = source;
    let mut text =
        format!("// {title}\n// {entry}: {threads} threads, {shared} bytes of shared memory");
    let params: Vec<_> = params.iter().map(|param| param.kind.size()).collect();
    let early = if *starts_early { ", starts early" } else { "" };
    writeln!(text, ", clusters of {cluster}{early}\n// parameters of {params:?} bytes")
        .expect("a String");
    text + &source.text
}

/// Name, title and text of all kernels.
fn sources() -> Vec<(&'static str, String, Source)> {
    let kernels = kernels().into_iter().map(|(name, kernel)| {
        let check = match kernel {
            Config::MatmulSm90(config) => config.check(232_448),
            Config::MatmulSm80(config) => config.check(166_912),
            Config::MatmulReduce(_) | Config::FlashCombine(_) | Config::Glu(_) => Ok(()),
            Config::FlashSm90(config) => config.check(232_448),
            Config::FlashSm80(config) => config.check(166_912),
        };
        check.unwrap_or_else(|why| panic!("{name}: {why}"));
        (name, kernel.name(), kernel.emit())
    });
    kernels.collect()
}

/// The writer's instructions as they are written, and a digest of each kernel.
#[test]
fn texts_are_as_before() {
    let kernels = sources();
    if let Some(folder) = std::env::var_os("KAIO_TEXTS").map(PathBuf::from) {
        fs::create_dir_all(&folder).expect("KAIO_TEXTS names a folder that can be made");
        for (name, title, source) in &kernels {
            let path = folder.join(format!("{name}.ptx"));
            fs::write(path, with_facts(title, source)).expect("KAIO_TEXTS can be written to");
        }
    }
    let digests = kernels
        .iter()
        .map(|(name, title, source)| (format!("{name}.digest"), digest(title, source)));
    let instructions = instructions::kernels().into_iter().map(|(name, source)| {
        (format!("{name}.ptx"), with_facts("each method of the writer, once", &source))
    });
    let now: Vec<_> = digests.chain(instructions).collect();

    let folder = golden_folder();
    let there = fs::read_dir(&folder).expect("tests/golden is there").filter_map(|entry| {
        let name = entry.expect("it can be read").file_name().into_string().ok()?;
        (name != RATCHET).then_some(name)
    });
    let mut stale: BTreeSet<_> = there.collect();
    let mut changed = Vec::new();
    for (name, text) in &now {
        stale.remove(name);
        let path = folder.join(name);
        let before = fs::read_to_string(&path).unwrap_or_default();
        if before == *text {
            continue;
        }
        match set("KAIO_BLESS") {
            true => fs::write(&path, text).expect("the checkout can be written to"),
            false => changed.push(difference(name, &before, text)),
        }
    }
    for name in stale {
        match set("KAIO_BLESS") {
            true => fs::remove_file(folder.join(name)).expect("it is there"),
            false => changed.push(format!("{name}: no kernel has this golden text")),
        }
    }
    assert!(
        changed.is_empty(),
        "{}\nIf that is meant: KAIO_BLESS=1 cargo test --test ptx, then read git diff tests/golden. \
         KAIO_TEXTS=FOLDER writes the kernels' texts to a folder.",
        changed.join("\n")
    );
}

/// The first lines that differ, up to ten of each.
fn difference(name: &str, before: &str, now: &str) -> String {
    let (before, now) = (before.lines().collect::<Vec<_>>(), now.lines().collect::<Vec<_>>());
    let without = |lines: &[&str], others: &[&str], sign: char| {
        let own = lines.iter().filter(|line| !others.contains(line)).take(10);
        own.map(|line| format!("\n  {sign} {line}")).collect::<String>()
    };
    format!("{name}:{}{}", without(&before, &now, '-'), without(&now, &before, '+'))
}
