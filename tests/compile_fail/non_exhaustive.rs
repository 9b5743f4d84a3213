use kaio_candle::prelude::*;

fn main() {
    let _ = FlashAttnOptions { causal: true, softmax_scale: None, engine: Engine::Auto };
    let _ = MatmulOptions { out_dtype: None, ..Default::default() };
}
