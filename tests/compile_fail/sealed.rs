use candle_core::Tensor;
use kaio_candle::KaioTensorExt;

struct Mine(Tensor);

impl AsRef<Tensor> for Mine {
    fn as_ref(&self) -> &Tensor {
        &self.0
    }
}

impl KaioTensorExt for Mine {}

fn main() {}
