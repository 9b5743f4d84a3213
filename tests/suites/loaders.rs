//! Quantised weights of checkpoints: the fixtures that the packages themselves made (scripts/quant_fixtures.py says how),
//! small ones made here, and files that are damaged.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor, bail, safetensors};
use kaio_candle::quant::{GptqFormat, Per, QuantScheme, QuantWeight};
use proptest::prelude::*;

use super::{Source, Tally, pairs, property, random_cases};

type Tensors = HashMap<String, Tensor>;

fn int4(group: i32, zero_points: bool) -> QuantScheme {
    QuantScheme::Int4 { group, zero_points }
}

fn nf4(block: usize) -> QuantScheme {
    QuantScheme::Nf4 { block }
}

fn fp8() -> QuantScheme {
    QuantScheme::Fp8 { per: Per::Block }
}

/// The fixtures, and what becomes of each.
fn fixtures() -> Vec<(&'static str, QuantScheme)> {
    vec![
        ("gptq_v1_g32", int4(32, true)),
        ("gptq_v1_g64", int4(64, true)),
        ("gptq_v1_g128", int4(128, true)),
        ("gptq_v1_column", int4(-1, true)),
        ("gptq_v1_symmetric_g64", int4(64, false)),
        ("gptq_v1_act_order_g32", int4(32, true)),
        ("gptq_v1_symmetric_act_order_g32", int4(32, false)),
        ("gptq_v2_g32", int4(32, true)),
        ("gptq_v2_column", int4(-1, true)),
        ("gptq_v2_symmetric_g128", int4(128, false)),
        ("gptq_v2_act_order_g64", int4(64, true)),
        ("gptq_v2_g256", int4(128, true)),
        ("gptq_v2_uneven_g64", int4(64, true)),
        ("gptq_v1_of_v2_g32", int4(32, true)),
        ("gptq_v1_of_v2_symmetric_g64", int4(64, false)),
        ("awq_g32", int4(32, true)),
        ("awq_g64", int4(64, true)),
        ("awq_g128", int4(128, true)),
        ("awq_column", int4(-1, true)),
        ("awq_symmetric_g64", int4(64, false)),
        ("compressed_tensors_symmetric_g32", int4(32, false)),
        ("compressed_tensors_symmetric_column", int4(-1, false)),
        ("compressed_tensors_asymmetric_g64", int4(64, true)),
        ("compressed_tensors_asymmetric_g128", int4(128, true)),
        ("compressed_tensors_asymmetric_column", int4(-1, true)),
        ("compressed_tensors_act_order_g32", int4(32, false)),
        ("compressed_tensors_fp8_blocks_of_outputs", fp8()),
        ("compressed_tensors_fp8_blocks_of_inputs", fp8()),
        ("nf4_b64", nf4(64)),
        ("nf4_b128", nf4(128)),
        ("nf4_nested_b64", nf4(64)),
        ("nf4_nested_b32", nf4(32)),
        ("fp8_blocks", fp8()),
    ]
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quant")
}

/// The tensors of the fixture as the layer `layer`, the columns that it says something about, and what it says.
fn read(name: &str) -> Result<(Tensors, Tensor, Tensor)> {
    let mut tensors =
        safetensors::load(folder().join(format!("{name}.safetensors")), &Device::Cpu)?;
    let mut take = |name: &str| match tensors.remove(name) {
        Some(t) => Ok(t),
        None => bail!("no `{name}`"),
    };
    let (columns, expected) = (take("columns")?, take("expected")?);
    let tensors = tensors.into_iter().map(|(name, t)| (format!("layer.{name}"), t));
    Ok((tensors.collect(), columns, expected))
}

/// Every bit is what the package says.
fn check(weight: &QuantWeight, columns: &Tensor, expected: &Tensor) -> Result<()> {
    let all = weight.dequantize(DType::F32)?.to_device(&Device::Cpu)?;
    same(&all.index_select(columns, 1)?, expected)
}

fn same(got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (got.to_vec2::<f32>()?, want.to_vec2::<f32>()?);
    for (k, (got, want)) in got.iter().zip(&want).enumerate() {
        for (n, (got, want)) in got.iter().zip(want).enumerate() {
            // A code of 0 times a scale is 0 of either sign.
            if got != want {
                bail!("element [{k}, {n}] is {got}, wanted {want}");
            }
        }
    }
    Ok(())
}

fn as_it_is(t: &Tensor) -> Result<Tensor> {
    Ok(t.clone())
}

/// i32 words as u32.
fn unsigned(t: &Tensor) -> Result<Tensor> {
    if t.dtype() != DType::I32 {
        return Ok(t.clone());
    }
    let words = t.flatten_all()?.to_vec1::<i32>()?;
    let words = words.into_iter().map(i32::cast_unsigned).collect();
    Tensor::from_vec(words, t.shape(), t.device())
}

/// The same elements, column by column, after one that is none of them.
fn strided(t: &Tensor) -> Result<Tensor> {
    if t.rank() != 2 || t.dtype() == DType::F8E4M3 {
        return Ok(t.clone());
    }
    let turned = t.t()?.contiguous()?;
    let more = Tensor::cat(&[&turned.narrow(0, 0, 1)?, &turned], 0)?;
    more.narrow(0, 1, turned.dims()[0])?.t()
}

pub fn packages(device: &Device) {
    let mut tally = Tally::new("loaders: fixtures of packages", device);
    let fixtures = fixtures();
    tally.case("all fixtures are here", || {
        let files = fs::read_dir(folder())?.map(|entry| Ok(entry?.path()));
        let files = files.collect::<Result<Vec<_>>>()?;
        let known = |file: &PathBuf| {
            let stem = file.file_stem().and_then(|stem| stem.to_str());
            fixtures.iter().any(|(name, _)| Some(*name) == stem)
        };
        match files.iter().find(|file| !known(file)) {
            Some(file) => bail!("{} is no fixture of the list", file.display()),
            None if files.len() < fixtures.len() => bail!("{} files", files.len()),
            None => Ok(()),
        }
    });
    for (name, scheme) in fixtures {
        tally.case(name, || {
            let (tensors, columns, expected) = read(name)?;
            for change in [as_it_is, unsigned, strided] {
                let changed = tensors
                    .iter()
                    .map(|(name, t)| Ok((name.clone(), change(t)?.to_device(device)?)));
                let changed = changed.collect::<Result<Tensors>>()?;
                let weight = QuantWeight::from_checkpoint(&changed, "layer")?;
                assert_eq!(weight.scheme(), scheme);
                assert_eq!(weight.dims2().0, expected.dims()[0]);
                assert_eq!(weight.device().location(), device.location());
                check(&weight, &columns, &expected)?;
            }
            // And as this crate saves it.
            let saved = QuantWeight::from_checkpoint(&tensors, "layer")?.to_tensors("layer.")?;
            let weight = QuantWeight::from_checkpoint(&saved, "layer")?;
            assert_eq!(weight.scheme(), scheme);
            check(&weight.to_device(device)?, &columns, &expected)?;
            Ok(())
        });
    }
    tally.finish();
}

/// A weight holds what its scheme says, and nothing else.
pub fn bytes(device: &Device) {
    let mut tally = Tally::new("loaders: bytes", device);
    // Codes, scales, zero points, the order of rows both ways.
    let cases = [
        ("gptq_v1_symmetric_g64", 128 * 32 / 2 + 2 * 32 * 2),
        ("gptq_v1_g64", 128 * 32 / 2 + 2 * 32 * 2 + 2 * 32),
        ("gptq_v1_act_order_g32", 128 * 32 / 2 + 4 * 32 * 2 + 4 * 32 + 2 * 128 * 4),
        ("nf4_nested_b64", 512 * 33 / 2 + 8 * 33 * 4),
        ("fp8_blocks", 128 * 256 + 2 * 4),
    ];
    for (name, bytes) in cases {
        tally.case(name, || {
            let (tensors, ..) = read(name)?;
            let weight = QuantWeight::from_checkpoint(&tensors, "layer")?.to_device(device)?;
            assert_eq!(weight.bytes(), bytes);
            Ok(())
        });
    }
    tally.finish();
}

/// GPTQ's two formats, told and not told.
pub fn gptq_formats(device: &Device) {
    use GptqFormat::{V1, V2};
    let mut tally = Tally::new("loaders: formats of GPTQ", device);
    for (name, format, other) in
        [("gptq_v1_g32", V1, V2), ("gptq_v2_g32", V2, V1), ("gptq_v1_of_v2_g32", V1, V2)]
    {
        tally.case(name, || {
            let (tensors, columns, expected) = read(name)?;
            let tensor = |name: &str| tensors[&format!("layer.{name}")].to_device(device);
            let (qweight, qzeros) = (&tensor("qweight")?, &tensor("qzeros")?);
            let (scales, g_idx) = (&tensor("scales")?, &tensor("g_idx")?);
            let load =
                |format| QuantWeight::from_gptq_with(qweight, qzeros, scales, Some(g_idx), format);
            check(&load(format)?, &columns, &expected)?;
            assert!(check(&load(other)?, &columns, &expected).is_err());
            // Groups follow each other, so that none need be named.
            let weight = QuantWeight::from_gptq(qweight, qzeros, scales, None)?;
            check(&weight, &columns, &expected)
        });
    }
    // Zero points of layers as they are: elements about 0, some of them far off, each group from its least to its greatest.
    for seed in 0..100 {
        let case = format!("random layer {seed}");
        tally.case(&case, || {
            let (k, n, group) = (256, 24, [32, 64, 128, 256][seed % 4]);
            let (words, zeros) = quantised(&mut Source::new(&case, device), k, n, group);
            let groups = k / group;
            let qweight = Tensor::from_vec(words, (k / 8, n), device)?;
            let scales = Tensor::ones((groups, n), DType::F32, &Device::Cpu)?.to_device(device)?;
            for (format, less) in [(V1, 0x1111_1111), (V2, 0u32)] {
                let stored = zeros.iter().map(|word| word.wrapping_sub(less)).collect();
                let qzeros = Tensor::from_vec(stored, (groups, n / 8), device)?;
                let told = QuantWeight::from_gptq(&qweight, &qzeros, &scales, None)?;
                let known = QuantWeight::from_gptq_with(&qweight, &qzeros, &scales, None, format)?;
                let [told, known] = [told, known].map(|weight| weight.dequantize(DType::F32));
                same(&told?.to_device(&Device::Cpu)?, &known?.to_device(&Device::Cpu)?)?;
            }
            Ok(())
        });
    }
    tally.finish();
}

/// Words of codes `[k/8, n]` and of zero points `[k/group, n/8]` of a random layer.
fn quantised(source: &mut Source, k: usize, n: usize, group: usize) -> (Vec<u32>, Vec<u32>) {
    let mut element = || (0..3).map(|_| source.unit()).sum::<f64>().powi(3);
    let weight: Vec<f64> = (0..k * n).map(|_| element()).collect();
    let (mut words, mut zeros) = (vec![0; k / 8 * n], vec![0; k / group * n / 8]);
    for (col, first) in pairs(0..n, (0..k).step_by(group)) {
        let rows = || (first..first + group).map(|row| (row, weight[row * n + col]));
        let (least, most) = rows().fold((0f64, 0f64), |(a, b), (_, w)| (a.min(w), b.max(w)));
        let scale = (most - least) / 15.0;
        let zero = (-least / scale).round();
        for (row, w) in rows() {
            let code = (w / scale + zero).round().clamp(0.0, 15.0) as u32;
            words[row / 8 * n + col] |= code << (4 * (row % 8));
        }
        zeros[(first / group * n + col) / 8] |= (zero as u32) << (4 * (col % 8));
    }
    (words, zeros)
}

/// 20 rows and 5 columns, which no package writes: half a word at the end of each.
pub fn small(device: &Device) {
    let mut tally = Tally::new("loaders: small weights", device);
    let (k, n) = (20, 5);
    let code = |k: usize, n: usize| (5 * k + 3 * n) % 16;
    let word = |codes: &mut dyn Iterator<Item = usize>| {
        codes.enumerate().fold(0, |word, (i, code)| word | (code as u32) << (4 * i))
    };
    let scale = |n: usize| 0.25 * (n + 1) as f32;
    let zero = |n: usize| 3 * n;
    let scales: Vec<f32> = (0..n).map(scale).collect();
    let value = |i: usize| scale(i % n) * (code(i / n, i % n) as f32 - zero(i % n) as f32);
    let expected = || Tensor::from_iter((0..k * n).map(value), &Device::Cpu)?.reshape((k, n));

    let words = (0..k.div_ceil(8)).flat_map(|block| {
        (0..n).map(move |n| word(&mut (8 * block..k.min(8 * block + 8)).map(|k| code(k, n))))
    });
    let words: Vec<u32> = words.collect();
    let zeros = word(&mut (0..n).map(zero));
    tally.case("GPTQ", || {
        let qweight = Tensor::new(words.as_slice(), device)?.reshape((3, n))?;
        let qzeros = Tensor::new(&[[zeros]], device)?;
        let scales = Tensor::new(scales.as_slice(), device)?.reshape((1, n))?;
        let g_idx = Tensor::zeros(k, DType::U32, device)?;
        let g_idx = Some(&g_idx);
        let weight =
            QuantWeight::from_gptq_with(&qweight, &qzeros, &scales, g_idx, GptqFormat::V2)?;
        same(&weight.dequantize(DType::F32)?.to_device(&Device::Cpu)?, &expected()?)
    });
    tally.case("compressed-tensors", || {
        let packed = Tensor::new(words.as_slice(), device)?.reshape((3, n))?.t()?;
        let scale = Tensor::new(scales.as_slice(), device)?.reshape((n, 1))?;
        let shape = Tensor::new(&[n as i64, k as i64], device)?;
        let zeros = Tensor::new(&[[zeros]], device)?;
        let zeros = Some(&zeros);
        // As a file has it whose rows are in order.
        let unset = Tensor::new(vec![-1i64; k], device)?;
        for g_idx in [None, Some(&unset)] {
            let weight =
                QuantWeight::from_compressed_tensors(&packed, &scale, &shape, zeros, g_idx)?;
            same(&weight.dequantize(DType::F32)?.to_device(&Device::Cpu)?, &expected()?)?;
        }
        Ok(())
    });
    // Scales for each output, or one, in a file of compressed-tensors' `float-quantized`.
    for (dims, scales) in [(vec![3, 1], [0.5f32, 2., 4.]), (vec![1], [0.5; 3]), (vec![], [0.5; 3])]
    {
        tally.case(format!("e4m3 with scales {dims:?}"), || {
            let weight = Tensor::new(&[[1f32, -2.], [0.5, 448.], [3., 0.]], &Device::Cpu)?;
            let count = dims.iter().product::<usize>();
            let scale = Tensor::from_slice(&scales[..count], dims.as_slice(), device)?;
            let file = [("weight", weight.to_dtype(DType::F8E4M3)?), ("weight_scale", scale)];
            let file = file.map(|(name, t)| Ok((name.into(), t.to_device(device)?)));
            let file = file.into_iter().collect::<Result<Tensors>>()?;
            let got = QuantWeight::from_checkpoint(&file, "")?.dequantize(DType::F32)?;
            let scales = Tensor::new(&scales, &Device::Cpu)?;
            same(&got.to_device(&Device::Cpu)?, &weight.t()?.broadcast_mul(&scales)?)
        });
    }
    tally.finish();
}

/// Files whose tensors are read when they are asked for.
pub fn mapped_files(device: &Device) {
    let mut tally = Tally::new("loaders: mapped files", device);
    tally.case("gptq_v2_g32", || {
        let (_, columns, expected) = read("gptq_v2_g32")?;
        let path = folder().join("gptq_v2_g32.safetensors");
        // candle marks it so, because others might write to the file.
        #[allow(unsafe_code)]
        // SAFETY: nobody writes to the fixtures while tests run.
        let files = unsafe { safetensors::MmapedSafetensors::new(path)? };
        check(&QuantWeight::from_checkpoint(&(&files, device), "")?, &columns, &expected)
    });
    tally.finish();
}

/// What a damaged file has in place of a tensor.
#[derive(Clone, Debug)]
enum Damage {
    Gone,
    Shorter { dim: usize, len: usize },
    Turned,
    Other { name: usize },
    Bytes { seed: u64 },
    Cast { dtype: usize },
}

fn damages() -> impl Strategy<Value = (usize, Vec<(usize, Damage)>)> {
    let damage = prop_oneof![
        Just(Damage::Gone),
        (0..2usize, 0..40usize).prop_map(|(dim, len)| Damage::Shorter { dim, len }),
        Just(Damage::Turned),
        (0..8usize).prop_map(|name| Damage::Other { name }),
        any::<u64>().prop_map(|seed| Damage::Bytes { seed }),
        (0..5usize).prop_map(|dtype| Damage::Cast { dtype }),
    ];
    (0..fixtures().len(), prop::collection::vec((0..8usize, damage), 1..4))
}

impl Damage {
    /// Changes a tensor, if there is a way to.
    fn change(&self, tensors: &mut Tensors, name: &str) -> Result<()> {
        let t = &tensors[name];
        let changed = match *self {
            Self::Gone => {
                tensors.remove(name);
                return Ok(());
            }
            Self::Shorter { dim, len } => {
                let dim = dim % t.rank().max(1);
                t.narrow(dim, 0, len.min(t.dims()[dim]))?
            }
            Self::Turned => t.flatten_all()?.reshape((t.elem_count(), 1))?.t()?,
            Self::Other { name } => {
                let mut names: Vec<_> = tensors.keys().collect();
                names.sort();
                tensors[names[name % names.len()]].clone()
            }
            Self::Bytes { seed } => scrambled(t, seed)?,
            Self::Cast { dtype } => {
                let dtypes = [DType::F32, DType::U8, DType::U32, DType::I64, DType::BF16];
                t.to_dtype(dtypes[dtype])?
            }
        };
        tensors.insert(name.into(), changed);
        Ok(())
    }
}

/// Other bits in some elements of a tensor of whole numbers or of scales.
fn scrambled(t: &Tensor, seed: u64) -> Result<Tensor> {
    let mut state = seed | 1;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let flat = t.flatten_all()?;
    let flat = match t.dtype() {
        DType::I32 => {
            let mut all = flat.to_vec1::<i32>()?;
            all.iter_mut().for_each(|x| *x = if random() % 8 == 0 { random() as i32 } else { *x });
            Tensor::from_vec(all, t.elem_count(), t.device())?
        }
        DType::U8 => {
            let mut all = flat.to_vec1::<u8>()?;
            all.iter_mut().for_each(|x| *x = if random() % 8 == 0 { random() as u8 } else { *x });
            Tensor::from_vec(all, t.elem_count(), t.device())?
        }
        DType::F8E4M3 => flat,
        dtype => {
            let mut all = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            let bits = |x| if random() % 8 == 0 { f32::from_bits(random() as u32) } else { x };
            all = all.into_iter().map(bits).collect();
            Tensor::from_vec(all, t.elem_count(), t.device())?.to_dtype(dtype)?
        }
    };
    flat.reshape(t.shape())
}

/// A damaged file gives an error or a weight, of finite scales, and never a panic.
pub fn damaged(device: &Device) {
    let mut tally = Tally::new("loaders: damaged files", device);
    let files = fixtures().into_iter().map(|(name, _)| read(name).expect("a fixture").0);
    let files: Vec<Tensors> = files.collect();
    let (refused, taken) = (Cell::new(0), Cell::new(0));
    let cases = random_cases(device, 3000, 100);
    property(&mut tally, cases, damages(), |(fixture, damages)| {
        let mut tensors = files[fixture].clone();
        let mut names: Vec<_> = tensors.keys().cloned().collect();
        names.sort();
        for (tensor, damage) in damages {
            let name = &names[tensor % names.len()];
            // candle has no such cast or view of every dtype.
            if tensors.contains_key(name) && damage.change(&mut tensors, name).is_err() {
                return Ok(());
            }
        }
        match QuantWeight::from_checkpoint(&tensors, "layer") {
            Ok(weight) => {
                taken.set(taken.get() + 1);
                let weight = weight.to_device(device)?;
                let (k, n) = weight.dims2();
                assert_eq!(weight.dequantize(DType::F32)?.dims(), [k, n]);
            }
            Err(error) if kaio_candle::Error::of(&error).is_some() => {
                refused.set(refused.get() + 1)
            }
            Err(error) => bail!("an error of no type of ours: {error}"),
        }
        Ok(())
    });
    tally.say(&format!("{} were refused, {} loaded", refused.get(), taken.get()));
    tally.case("some of each", || {
        assert!(refused.get() > cases / 4 && taken.get() > cases / 20);
        Ok(())
    });
    tally.finish();
}
