//! The registry: one device an ordinal, whoever asks first.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kaio::prelude::KaioDevice;
use kaio_candle::{Error, prelude::*};

use super::gpu;

/// One test, because the registry is one for the process.
#[test]
fn registry_of_devices() {
    let Some(gpu) = gpu() else { return };

    let first: Vec<Arc<KaioDevice>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| registry::device(0))).collect();
        threads.into_iter().map(|t| t.join().unwrap().unwrap()).collect()
    });
    assert!(first.iter().all(|device| Arc::ptr_eq(device, &first[0])));

    let on_gpu = Tensor::zeros(1, DType::F32, &gpu).unwrap();
    assert!(Arc::ptr_eq(&registry::device_of(&on_gpu).unwrap(), &first[0]));

    let on_cpu = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    let error = registry::device_of(&on_cpu).unwrap_err();
    assert!(matches!(error, Error::NotCuda { .. }));
    assert_eq!(
        error.to_string(),
        "registry::device_of: wanted a CUDA tensor, got one on the CPU; move it with \
         `.to_device(&Device::new_cuda(0)?)?`"
    );

    for _ in 0..2 {
        let error = registry::device(99).unwrap_err();
        assert!(matches!(error, Error::NoDevice { ordinal: 99, .. }));
        let text = error.to_string();
        assert!(text.starts_with("no CUDA device at ordinal 99: "), "{text}");
        assert!(text.contains("CUDA_ERROR_INVALID_DEVICE"), "the driver's own words: {text}");
    }

    let own = Arc::new(KaioDevice::new(0).unwrap());
    let replaced = registry::register(own.clone()).expect("a device was there");
    assert!(Arc::ptr_eq(&replaced, &first[0]));
    assert!(Arc::ptr_eq(&registry::device(0).unwrap(), &own));
    let a = Tensor::ones((16, 16), DType::F16, &gpu).unwrap();
    let sum = a.kaio_matmul_tc(&a).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(sum, 16. * 16. * 16.);
    registry::register(replaced);
}
