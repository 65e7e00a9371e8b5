// The module _torch_<major>_<minor>: the functions that _core asks of LibTorch, in a capsule, and the release of torch
// that they were built for. For statedict_io alone; it has to be imported after torch, whose libraries it needs.
//
// SDIO_TORCH_MODULE is its name, SDIO_TORCH_VERSION the release, both from the build.
#include <Python.h>

#include "torch/functions.h"

#define SDIO_TEXT_OF(name) #name
#define SDIO_TEXT(name) SDIO_TEXT_OF(name)
#define SDIO_INIT_OF(name) PyInit_##name
#define SDIO_INIT(name) SDIO_INIT_OF(name)

namespace sdio {

sdio_torch_functions all_functions() {
  sdio_torch_functions functions = device_functions();
  functions.storage_of = &storage_of;
  functions.storage_wrap = &storage_wrap;
  functions.storage_facts = &storage_facts;
  functions.storage_device = &storage_device;
  functions.storage_over = &storage_over;
  functions.plain_tensor = &plain_tensor;
  functions.fix = &fix;
  functions.unfix = &unfix;
  functions.forget_fixed = &forget_fixed;
  functions.destination_storage = &destination_storage;
  return functions;
}

namespace {

bool fill(PyObject* module) {
  static const sdio_torch_functions functions = all_functions();
  PyObject* const capsule =
      PyCapsule_New(const_cast<sdio_torch_functions*>(&functions), SDIO_TORCH_FUNCTIONS_CAPSULE, nullptr);
  const bool added = capsule != nullptr && PyModule_AddObjectRef(module, "functions", capsule) == 0;
  Py_XDECREF(capsule);
  return added && PyModule_AddStringConstant(module, "built_for", functions.torch_version) == 0;
}

}  // namespace
}  // namespace sdio

PyMODINIT_FUNC SDIO_INIT(SDIO_TORCH_MODULE)() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "statedict_io." SDIO_TEXT(SDIO_TORCH_MODULE),
                                   "What statedict_io asks of LibTorch; use statedict_io, not this.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr || sdio::fill(module)) return module;
  Py_DECREF(module);
  return nullptr;
}
