// The pipeline's steps in the profiles of torch.profiler, beside the device's own copies.
#pragma once

namespace sdio {

void record_steps_in_profiles();

}  // namespace sdio
