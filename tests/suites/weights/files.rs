//! Weights written and read, and what they hold.

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::Error;
use kaio_candle::prelude::*;

use super::{SCHEMES, format, int4, scales_of, tensors, weight};
use crate::suites::{Nd, Source, Tally, identical, pairs};

/// Round trips of every scheme, and the bytes of each.
pub fn files(device: &Device) {
    let mut tally = Tally::new("files of weights", device);
    let folder = std::env::temp_dir().join(format!("kaio-candle-weights-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for files");
    for (number, (scheme, (dims, order))) in
        pairs(SCHEMES, pairs([[1, 1], [130, 129], [0, 3], [256, 32]], [false, true])).enumerate()
    {
        let case = format!("{scheme:?} {dims:?} {order}");
        tally.case(&case, || {
            let w =
                weight(&mut Source::new(&case, device), device, scheme, dims, DType::F16, order)?;
            let path = folder.join(format!("{number}.safetensors"));
            w.save(&path)?;
            let back = QuantWeight::load(&path, device)?;
            if (back.scheme(), back.dims2()) != (scheme, dims.into())
                || !back.device().same_device(device)
            {
                bail!("{back:?}");
            }
            let (before, after) = (w.to_tensors("")?, back.to_tensors("")?);
            if before.len() != after.len() {
                bail!("{:?} became {:?}", before.keys(), after.keys());
            }
            for (name, t) in &before {
                identical(name, &after[name], &Nd::of(t)?)?;
            }
            let same = QuantWeight::from_tensors("layer.0.", &w.to_tensors("layer.0.")?)?;
            identical(
                "prefixed",
                &same.dequantize(DType::F32)?,
                &Nd::of(&w.dequantize(DType::F32)?)?,
            )?;
            let [k, n] = dims;
            let groups = scales_of(scheme, dims).iter().product::<usize>();
            let codes = match scheme {
                QuantScheme::Int4 { .. } | QuantScheme::Nf4 { .. } => k.div_ceil(8) * 4 * n,
                _ => k * n,
            };
            let zeros = if matches!(scheme, QuantScheme::Int4 { zero_points: true, .. }) {
                groups
            } else {
                0
            };
            let want = codes + 2 * groups + zeros + if order { 2 * 4 * k } else { 0 };
            if device.is_cpu() && w.bytes() != want {
                bail!("{} bytes, wanted {want}", w.bytes());
            }
            let text = format!("{w:?}");
            if text.len() > 200 || !text.contains("QuantWeight") {
                bail!("Debug is {text}");
            }
            Ok(())
        });
    }
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    tally.finish();
}

/// Tensors that are no weight: an error that names what is wrong.
pub fn bad_files(device: &Device) {
    let mut tally = Tally::new("bad files of weights", device);
    let dims = [130, 40];
    let scheme = int4(64, true);
    let mut check = |case: &str, name: &str, change: &dyn Fn() -> Result<Option<Tensor>>| {
        tally.case(case, || {
            let mut all = tensors(&mut Source::new(case, device), scheme, dims, DType::F16, true)?;
            match change()? {
                Some(t) => all.insert(name.into(), t),
                None => all.remove(name),
            };
            match QuantWeight::from_tensors("", &all) {
                Err(e)
                    if Error::of(&e).is_some() && e.to_string().contains(&format!("`{name}`")) =>
                {
                    Ok(())
                }
                other => bail!("gave {other:?}"),
            }
        });
    };
    let cpu = &Device::Cpu;
    for name in ["codes", "scales", "zeros", "format"] {
        check(&format!("no {name}"), name, &|| Ok(None));
        check(&format!("{name} of another shape"), name, &|| match name {
            "format" => Tensor::zeros(7, DType::U8, cpu).map(Some),
            "zeros" => Tensor::zeros((3, 41), DType::U8, cpu).map(Some),
            "codes" => Tensor::zeros((16, 40), DType::U32, cpu).map(Some),
            _ => Tensor::zeros((40, 3), DType::F16, cpu).map(Some),
        });
        check(&format!("{name} of another dtype"), name, &|| {
            Tensor::zeros((3, 40), DType::F64, cpu).map(Some)
        });
    }
    for bad in [f32::NAN, f32::INFINITY] {
        check(&format!("a scale of {bad}"), "scales", &|| {
            Tensor::full(bad, (3, 40), cpu).map(Some)
        });
    }
    check("a zero point of 17", "zeros", &|| Tensor::full(17u8, (3, 40), cpu).map(Some));
    check("a row twice", "order", &|| Tensor::zeros(130, DType::U32, cpu).map(Some));
    check("a row past the last", "order", &|| {
        Tensor::new((1..131).collect::<Vec<u32>>(), cpu).map(Some)
    });
    check("fewer rows", "order", &|| Tensor::new((0..129).collect::<Vec<u32>>(), cpu).map(Some));
    for (case, other) in
        [("more rows", format(scheme, [137, 40])), ("another group", format(int4(-1, true), dims))]
    {
        tally.case(case, || {
            let mut all = tensors(&mut Source::new(case, device), scheme, dims, DType::F16, false)?;
            all.insert("format".into(), other?);
            match QuantWeight::from_tensors("", &all) {
                Err(e) if matches!(Error::of(&e), Some(Error::Value { .. })) => Ok(()),
                other => bail!("gave {other:?}"),
            }
        });
    }
    tally.finish();
}
