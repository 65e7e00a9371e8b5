#include "core/memory_object.h"

#include "core/owned.h"

namespace py = pybind11;

namespace sdio {
namespace {

// No pybind11 class: 100,000 of them are made at once, and live as long as the tensors.
struct MemoryObject {
  PyObject_HEAD char* data;
  Py_ssize_t nbytes;
  ReadMemory* memory;
};

int get_buffer(PyObject* self, Py_buffer* view, int flags) {
  auto* const object = reinterpret_cast<MemoryObject*>(self);
  return PyBuffer_FillInfo(view, self, object->data, object->nbytes, /*readonly=*/0, flags);
}

void dealloc(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  delete reinterpret_cast<MemoryObject*>(self)->memory;
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* memory_type = nullptr;

}  // namespace

void make_memory_type() {
  if (memory_type != nullptr) return;
  PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&dealloc)},
                         {Py_bf_getbuffer, reinterpret_cast<void*>(&get_buffer)},
                         {0, nullptr}};
  PyType_Spec spec = {"statedict_io._core.Memory", sizeof(MemoryObject), 0,
                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
  memory_type = reinterpret_cast<PyTypeObject*>(owned(PyType_FromSpec(&spec)).release().ptr());
}

py::object memory_object(char* data, uint64_t nbytes, std::unique_ptr<ReadMemory> memory) {
  py::object made = owned(memory_type->tp_alloc(memory_type, 0));
  auto* const object = reinterpret_cast<MemoryObject*>(made.ptr());
  object->data = data;
  object->nbytes = static_cast<Py_ssize_t>(nbytes);
  object->memory = memory.release();
  return made;
}

}  // namespace sdio
