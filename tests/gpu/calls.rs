//! What a call asks of the driver, which is most of the host's time: counted where there is someone to count.
#![allow(unsafe_code)] // The count.

use std::ffi::{CStr, c_char, c_void};

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::prelude::*;

use super::suites::{Layout, Source};
use super::{gpu, say};

/// Allocations, launches, copies and fills, bytes to the host.
type Counts = [u64; 4];

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// What tests/emulator counts. Other drivers do not.
fn counter() -> Option<impl Fn() -> Counts> {
    const NAME: &CStr = c"emulator_calls";
    // SAFETY: any name can be looked up, in all that is loaded.
    let found = unsafe { dlsym(std::ptr::null_mut(), NAME.as_ptr()) };
    if found.is_null() {
        return None;
    }
    // SAFETY: this is the function of that name in tests/emulator/src/calls.rs.
    let read =
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut Counts)>(found) };
    Some(move || {
        let mut counts = Counts::default();
        // SAFETY: it writes to the local that it is given.
        unsafe { read(&mut counts) };
        counts
    })
}

type Call<'a> = Box<dyn Fn() -> Result<Tensor> + 'a>;

/// e4m3 of zeros; by way of the host, as candle cannot cast to it on a GPU.
fn e4m3(dims: [usize; 2], device: &Device) -> Result<Tensor> {
    Tensor::zeros(&dims, DType::F32, &Device::Cpu)?.to_dtype(DType::F8E4M3)?.to_device(device)
}

/// Products of prepared weights, and of codes as they lie in them, allocate their result and what their kernels leave for each
/// other, and launch these kernels alone. On Hopper, where all of them are.
#[test]
fn calls_of_quantised_products() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let Some(counts) = counter() else {
        say("does not apply: a count of the driver's calls, this driver does not count");
        return Ok(());
    };
    if std::env::var("KAIO_ARCH").is_ok_and(|arch| !arch.is_empty() && arch != "sm_90a") {
        say("does not apply: a count of the calls of Hopper's kernels");
        return Ok(());
    }
    let (k, n) = (512, 256);
    let mut source = Source::new("calls", &Device::Cpu);
    let w = source.tensor(DType::F32, &[k, n], Layout::Plain)?;
    let weight = |scheme: QuantScheme| {
        let weight = QuantWeight::quantize(&w, &scheme)?.to_device(&device)?;
        weight.prepare().map(|()| weight)
    };
    let int4 = weight(QuantScheme::Int4 { group: 128, zero_points: false })?;
    let [int8, int8_one] = [Per::Channel, Per::Tensor].map(|per| weight(QuantScheme::Int8 { per }));
    let [fp8, fp8_one, fp8_blocks] =
        [Per::Channel, Per::Tensor, Per::Block].map(|per| weight(QuantScheme::Fp8 { per }));
    let (int8, int8_one) = (int8?, int8_one?);
    let (fp8, fp8_one, fp8_blocks) = (fp8?, fp8_one?, fp8_blocks?);
    let [float, as_int8, as_fp8] = [Activations::Float, Activations::Int8, Activations::Fp8]
        .map(|how| MatmulOptions::default().activations(how));

    let b = Tensor::zeros((n, k), DType::U8, &device)?.t()?;
    let b_e4m3 = e4m3([n, k], &device)?.t()?;
    let [one, each] = [1, n].map(|len| Tensor::ones(len, DType::F32, &device));
    let plain = Int8Options::default();
    let one_scale = plain.clone().rhs_scales(one?);
    let of_columns = plain.clone().rhs_scales(each?);
    let shifted = plain.clone().zero_point(3);
    let fp8_opts = Fp8Options::default();
    let few = [1, 16].map(|m| (m, 0));
    for (m, more) in few.into_iter().chain([(256, 1)]) {
        let x = source.tensor(DType::BF16, &[m, k], Layout::Plain)?.to_device(&device)?;
        let a = Tensor::zeros((m, k), DType::U8, &device)?;
        let a_e4m3 = e4m3([m, k], &device)?;
        let quant = |weight, opts| -> Call {
            let x = &x;
            Box::new(move || x.kaio_matmul_quant_with(weight, opts))
        };
        let int8_with = |opts| -> Call {
            let (a, b) = (&a, &b);
            Box::new(move || a.kaio_matmul_int8_with(b, opts))
        };
        // Allocations, launches and copies; few rows are rounded into what the result's allocation has more. Two kernels are one
        // graph.
        let one_by_one = std::env::var("KAIO_GRAPHS").is_ok_and(|value| value == "0");
        let rounded = [1 + more, if one_by_one { 2 } else { 1 }, 0];
        let single = [1, 1, 0];
        let cases: [(&str, Call, [u64; 3]); 13] = [
            ("int4", quant(&int4, &float), single),
            ("int8", quant(&int8, &float), single),
            ("fp8", quant(&fp8, &float), single),
            ("fp8 blocks", quant(&fp8_blocks, &float), single),
            ("x as int8", quant(&int8, &as_int8), rounded),
            ("x as int8, one scale", quant(&int8_one, &as_int8), rounded),
            ("x as fp8", quant(&fp8, &as_fp8), rounded),
            ("x as fp8, one scale", quant(&fp8_one, &as_fp8), rounded),
            ("x as fp8, blocks", quant(&fp8_blocks, &as_fp8), rounded),
            ("codes", int8_with(&plain), single),
            ("codes, one scale", int8_with(&one_scale), single),
            ("codes, scales of columns", int8_with(&of_columns), single),
            // The sums of the weight's columns.
            ("codes, a zero point", int8_with(&shifted), [2, 2, 0]),
        ];
        let fp8: Call = Box::new(|| a_e4m3.kaio_matmul_fp8(&b_e4m3, &fp8_opts));
        for (name, call, want) in cases.into_iter().chain([("e4m3", fp8, single)]) {
            // Compiles the kernels.
            call()?;
            let before = counts();
            let out = call()?;
            let after = counts();
            drop(out);
            let counted: [u64; 3] = std::array::from_fn(|i| after[i] - before[i]);
            assert_eq!(counted, want, "{name}, {m} rows: allocations, launches, copies");
        }
    }
    Ok(())
}

/// The words of a checkpoint's weight stay on the GPU: the host sees what says how they are meant, and whether scales are finite.
#[test]
fn loading_reads_little() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let Some(counts) = counter() else {
        say("does not apply: a count of bytes to the host, this driver does not count");
        return Ok(());
    };
    let (k, n) = (1024, 256);
    let words = |rows, cols| Tensor::full(0x5678_9abc_u32, (rows, cols), &device);
    let scales = |rows: usize, cols: usize| Tensor::full(0.5f32, (rows, cols), &device);
    let groups = k / 128;
    // Zero points of 7 and 8, by which no format is told.
    let zeros = Tensor::full(0x8787_8787_u32, (groups, n / 8), &device)?;
    let order = Tensor::from_iter((0..k as u32).map(|row| row % groups as u32), &device)?;
    let state = br#"{"quant_type": "nf4", "blocksize": 64, "shape": [256, 1024]}"#;
    let state = Tensor::new(state.as_slice(), &device)?;
    let shape = Tensor::new(&[n as i64, k as i64], &device)?;
    let absmax = Tensor::ones(k * n / 64, DType::F32, &device)?;
    let nibbles = Tensor::full(0x4b_u8, k * n / 2, &device)?;
    let bytes = e4m3([n, k], &device)?;

    type Load<'a> = Box<dyn Fn() -> Result<QuantWeight> + 'a>;
    let cases: [(&str, Load); 5] = [
        (
            "GPTQ",
            Box::new(|| {
                let (qweight, scales) = (words(k / 8, n)?, scales(groups, n)?);
                QuantWeight::from_gptq(&qweight, &zeros, &scales, Some(&order))
            }),
        ),
        ("AWQ", Box::new(|| QuantWeight::from_awq(&words(k, n / 8)?, &zeros, &scales(groups, n)?))),
        (
            "compressed-tensors",
            Box::new(|| {
                let (packed, scales) = (words(n, k / 8)?, scales(n, groups)?);
                QuantWeight::from_compressed_tensors(&packed, &scales, &shape, None, None)
            }),
        ),
        ("nf4", Box::new(|| QuantWeight::from_nf4(&nibbles, &absmax, &state, None))),
        ("fp8", Box::new(|| QuantWeight::from_fp8(&bytes.t()?, &scales(n / 128, k / 128)?.t()?))),
    ];
    for (name, load) in cases {
        let before = counts();
        let weight = load()?;
        weight.prepare()?;
        let read = counts()[3] - before[3];
        assert_eq!(weight.dims2(), (k, n), "{name}");
        assert!(read < (k * n / 2 / 8) as u64, "{name}: {read} bytes are read by the host");
    }
    Ok(())
}
