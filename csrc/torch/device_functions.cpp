#include "torch/functions.h"

namespace sdio {

sdio_torch_functions device_functions() {
  sdio_torch_functions functions = {};
  functions.version = SDIO_TORCH_FUNCTIONS_VERSION;
  functions.torch_version = SDIO_TORCH_VERSION;
  functions.storage_retain = &storage_retain;
  functions.storage_release = &storage_release;
  functions.pin = &pin;
  functions.unpin = &unpin;
  functions.source_new = &source_new;
  functions.source_copy = &source_copy;
  functions.source_delete = &source_delete;
  functions.destination_new = &destination_new;
  functions.destination_copy = &destination_copy;
  functions.copies_wait = &copies_wait;
  functions.copies_delete = &copies_delete;
  functions.destination_delete = &destination_delete;
  functions.clones_new = &clones_new;
  functions.clones_of = &clones_of;
  functions.clones_done = &clones_done;
  functions.clones_wait = &clones_wait;
  functions.clones_delete = &clones_delete;
  functions.step_begin = &step_begin;
  functions.step_end = &step_end;
  functions.recording_of_this_thread = &recording_of_this_thread;
  functions.recording_continue = &recording_continue;
  functions.recording_delete = &recording_delete;
  return functions;
}

}  // namespace sdio
