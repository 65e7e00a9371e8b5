/* What the module _core asks of LibTorch: a table of C functions that a module _torch_<release> hands over in a
 * capsule.
 *
 * The two are compiled apart, perhaps by different compilers with different standard libraries, so nothing crosses but
 * C types, and no exception. A table of another version is not used.
 *
 * "GIL": the caller holds it; a function that fails there has set a Python error. The others are called from any
 * thread, with or without the GIL, and describe a failure in an sdio_error. Handles are released with the function
 * named for them, in any thread; storages with the GIL or without.
 */
#ifndef SDIO_BOUNDARY_TORCH_FUNCTIONS_H_
#define SDIO_BOUNDARY_TORCH_FUNCTIONS_H_

#include <Python.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SDIO_TORCH_FUNCTIONS_VERSION 2
#define SDIO_TORCH_FUNCTIONS_CAPSULE "statedict_io.torch_functions"

/* Pieces below this are gathered on the device, where the caller gives a slot for them to come through. */
#define SDIO_GATHER_BELOW_NBYTES (128u << 10)

typedef struct sdio_storage sdio_storage; /* a c10::StorageImpl, counted */
typedef struct sdio_fixed sdio_fixed;
typedef struct sdio_pinned sdio_pinned;
typedef struct sdio_source sdio_source;
typedef struct sdio_destination sdio_destination;
typedef struct sdio_copies sdio_copies;
typedef struct sdio_clones sdio_clones;
typedef struct sdio_step sdio_step;
typedef struct sdio_recording sdio_recording;

typedef enum {
  SDIO_OK = 0,
  SDIO_FAILED = 1,      /* what the device or torch reports: a RuntimeError with the message */
  SDIO_NO_MEMORY = 2,   /* of the device, or std::bad_alloc */
  SDIO_UNSUPPORTED = 3, /* the device has no streams or no events */
} sdio_status;

typedef struct {
  char message[1000]; /* cut where it is longer; NUL-terminated */
} sdio_error;

typedef struct {
  const char* data; /* null where it has no bytes, and on the meta device */
  uint64_t nbytes;
  int on_host; /* on the device type CPU */
} sdio_storage_facts;

/* A tensor that torch reduces to _rebuild_tensor_v2: strided, dense, no lazy conjugation or negation, no wrapper, no
 * mode. Pointers are valid while the tensor is, and nobody changes its shape. */
typedef struct {
  const sdio_storage* storage; /* borrowed: identity, and storage_retain() */
  PyObject* dtype;             /* borrowed */
  int64_t storage_offset;
  int64_t itemsize;
  int64_t num_dimensions;
  const int64_t* sizes;
  const int64_t* strides;
  int requires_grad;
} sdio_plain_tensor;

/* Bytes of a storage on a device; no storage: the record is not on a device. */
typedef struct {
  const sdio_storage* storage; /* borrowed */
  uint64_t offset;
  uint64_t nbytes;
} sdio_device_bytes;

typedef struct {
  size_t record;
  uint64_t record_offset;
  uint64_t nbytes;
  char* destination;
} sdio_device_piece;

typedef struct {
  size_t request;
  uint64_t payload_offset;
  uint64_t nbytes;
  const char* source;
} sdio_arrived_piece;

typedef struct {
  uint32_t version;          /* SDIO_TORCH_FUNCTIONS_VERSION */
  const char* torch_version; /* that it was built for, "2.13.0+cpu" */

  /* Storages. GIL, but for storage_release. */
  sdio_storage* (*storage_of)(PyObject* untyped_storage); /* new; null with TypeError for anything else */
  sdio_storage* (*storage_retain)(const sdio_storage*);
  void (*storage_release)(sdio_storage*);
  PyObject* (*storage_wrap)(const sdio_storage*); /* new reference to a torch.UntypedStorage */
  /* 0; -1 with the error that torch's data_ptr() raises where bytes have no address. */
  int (*storage_facts)(const sdio_storage*, sdio_storage_facts*);
  /* "cuda:0", cut where `name` has not `size` bytes; NUL-terminated. */
  void (*storage_device)(const sdio_storage*, char* name, size_t size);
  /* A CPU storage over memory of ours, not resizable; release(context) when its last owner is gone, in any thread, and
   * where this fails. */
  PyObject* (*storage_over)(char* data, uint64_t nbytes, void (*release)(void* context), void* context);

  /* 1: a plain tensor; 0: another kind. GIL. `tensor` is an exact torch.Tensor or Parameter. */
  int (*plain_tensor)(PyObject* tensor, sdio_plain_tensor*);

  /* Keeps the memory of storages where it is: resize_() raises meanwhile. GIL. */
  sdio_fixed* (*fix)(sdio_storage* const* storages, size_t num_storages); /* null with MemoryError */
  void (*unfix)(sdio_fixed*);
  void (*forget_fixed)(void); /* in a forked child: what threads of the parent have fixed */

  /* Memory that an accelerator copies from and to at full speed; null where none can be pinned. */
  sdio_pinned* (*pin)(size_t nbytes, char** data);
  void (*unpin)(sdio_pinned*);

  /* Storages on devices that are read. source_new is called in the thread whose current streams the copies are ordered
   * after; records[i] is what a piece of record i is of. source_copy returns when every byte is at its destination, or
   * nothing is under way any more; pieces below SDIO_GATHER_BELOW_NBYTES are gathered on the device and come through
   * `bounce`, which has room for all of them, unless that is null.
   */
  sdio_source* (*source_new)(const sdio_device_bytes* records, size_t num_records, sdio_status*, sdio_error*);
  sdio_status (*source_copy)(sdio_source*, const sdio_device_piece* pieces, size_t num_pieces, char* bounce,
                             sdio_error*);
  void (*source_delete)(sdio_source*);

  /* New storages on a device that are filled, ordered as above. destination_copy queues and returns; copies_delete
   * waits for what copies_wait has not. Copies are deleted before their destination. */
  sdio_destination* (*destination_new)(const char* device, const uint64_t* sizes, size_t num_sizes, sdio_status*,
                                       sdio_error*);
  sdio_copies* (*destination_copy)(sdio_destination*, const sdio_arrived_piece* pieces, size_t num_pieces, sdio_status*,
                                   sdio_error*);
  sdio_status (*copies_wait)(sdio_copies*, sdio_error*);
  void (*copies_delete)(sdio_copies*);
  PyObject* (*destination_storage)(const sdio_destination*, size_t request); /* GIL; a new torch.UntypedStorage */
  void (*destination_delete)(sdio_destination*);

  /* Copies of storages in the memory of their devices, queued on the calling thread's current streams. Records without
   * bytes have no storage. clones_done: 1 too where the device fails, as clones_wait then tells. */
  sdio_clones* (*clones_new)(const sdio_device_bytes* originals, size_t num_originals, sdio_status*, sdio_error*);
  sdio_device_bytes (*clones_of)(const sdio_clones*, size_t record);
  int (*clones_done)(const sdio_clones*);
  sdio_status (*clones_wait)(const sdio_clones*, sdio_error*);
  void (*clones_delete)(sdio_clones*);

  /* Steps in torch's profiles; a null step is not recorded. */
  sdio_step* (*step_begin)(const char* name);
  void (*step_end)(sdio_step*);
  sdio_recording* (*recording_of_this_thread)(void);
  void (*recording_continue)(const sdio_recording*); /* in another thread */
  void (*recording_delete)(sdio_recording*);
} sdio_torch_functions;

#ifdef __cplusplus
}
#endif

#endif /* SDIO_BOUNDARY_TORCH_FUNCTIONS_H_ */
