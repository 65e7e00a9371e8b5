// The functions of boundary/torch_functions.h. None throws.
#pragma once

#include <cstddef>
#include <cstdint>

#include "boundary/torch_functions.h"

namespace sdio {

// The functions that do not need Python; the others are null.
sdio_torch_functions device_functions();
// All functions.
sdio_torch_functions all_functions();

// storages
sdio_storage* storage_of(PyObject* untyped_storage) noexcept;
sdio_storage* storage_retain(const sdio_storage* storage) noexcept;
void storage_release(sdio_storage* storage) noexcept;
PyObject* storage_wrap(const sdio_storage* storage) noexcept;
int storage_facts(const sdio_storage* storage, sdio_storage_facts* facts) noexcept;
void storage_device(const sdio_storage* storage, char* name, size_t size) noexcept;
PyObject* storage_over(char* data, uint64_t nbytes, void (*release)(void*), void* context) noexcept;

// plain_tensor
int plain_tensor(PyObject* tensor, sdio_plain_tensor* plain) noexcept;

// fixed_storages
sdio_fixed* fix(sdio_storage* const* storages, size_t num_storages) noexcept;
void unfix(sdio_fixed* fixed) noexcept;
void forget_fixed() noexcept;

// pinned_memory
sdio_pinned* pin(size_t nbytes, char** data) noexcept;
void unpin(sdio_pinned* pinned) noexcept;

// device_source
sdio_source* source_new(const sdio_device_bytes* records, size_t num_records, sdio_status* status,
                        sdio_error* error) noexcept;
sdio_status source_copy(sdio_source* source, const sdio_device_piece* pieces, size_t num_pieces, char* bounce,
                        sdio_error* error) noexcept;
void source_delete(sdio_source* source) noexcept;

// device_destination
sdio_destination* destination_new(const char* device, const uint64_t* sizes, size_t num_sizes, sdio_status* status,
                                  sdio_error* error) noexcept;
sdio_copies* destination_copy(sdio_destination* destination, const sdio_arrived_piece* pieces, size_t num_pieces,
                              sdio_status* status, sdio_error* error) noexcept;
sdio_status copies_wait(sdio_copies* copies, sdio_error* error) noexcept;
void copies_delete(sdio_copies* copies) noexcept;
const sdio_storage* destination_storage_handle(const sdio_destination* destination, size_t request) noexcept;
void destination_delete(sdio_destination* destination) noexcept;
PyObject* destination_storage(const sdio_destination* destination, size_t request) noexcept;  // in storages

// device_clones
sdio_clones* clones_new(const sdio_device_bytes* originals, size_t num_originals, sdio_status* status,
                        sdio_error* error) noexcept;
sdio_device_bytes clones_of(const sdio_clones* clones, size_t record) noexcept;
int clones_done(const sdio_clones* clones) noexcept;
sdio_status clones_wait(const sdio_clones* clones, sdio_error* error) noexcept;
void clones_delete(sdio_clones* clones) noexcept;

// profiler_steps
sdio_step* step_begin(const char* name) noexcept;
void step_end(sdio_step* step) noexcept;
sdio_recording* recording_of_this_thread() noexcept;
void recording_continue(const sdio_recording* recording) noexcept;
void recording_delete(sdio_recording* recording) noexcept;

}  // namespace sdio
