use kaio_candle::KaioTensorExt;

struct Mine;

impl KaioTensorExt for Mine {}

fn main() {}
