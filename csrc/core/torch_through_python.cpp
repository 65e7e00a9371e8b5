#include "core/torch_through_python.h"

#include <string>
#include <utility>

#include "core/devices_through_python.h"
#include "core/memory_object.h"
#include "core/owned.h"
#include "core/python_error.h"

namespace py = pybind11;

namespace sdio {
namespace {

// A method or an attribute that is looked up in its class once, not in every one of 100,000 objects.
class Method {
 public:
  Method(const py::handle& type, const char* name) : function_(type.attr(name)) {}

  py::object operator()(PyObject* self) const {
    PyObject* const arguments[] = {nullptr, self};
    return owned([&] {
      return PyObject_Vectorcall(function_.ptr(), arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    });
  }

 private:
  const py::object function_;
};

class Attribute {
 public:
  Attribute(const py::handle& type, const char* name)
      : descriptor_(type.attr(name)), get_(Py_TYPE(descriptor_.ptr())->tp_descr_get) {
    if (get_ == nullptr) throw py::type_error(std::string(name) + " is no attribute of instances");
  }

  py::object operator()(PyObject* self) const {
    return owned([&] { return get_(descriptor_.ptr(), self, reinterpret_cast<PyObject*>(Py_TYPE(self))); });
  }

 private:
  const py::object descriptor_;
  const descrgetfunc get_;
};

uint64_t as_uint64(const py::object& number) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(number.ptr());
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

const void* as_pointer(const py::object& number) {
  const void* const value = PyLong_AsVoidPtr(number.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// torch.Size is a tuple, but pickled as one of its own kind.
py::object exact_tuple(const py::object& sequence) {
  if (PyTuple_CheckExact(sequence.ptr())) return sequence;
  if (!PyTuple_Check(sequence.ptr())) throw py::type_error("a tensor's shape is no tuple");
  return owned([&] { return PyTuple_GetSlice(sequence.ptr(), 0, PyTuple_GET_SIZE(sequence.ptr())); });
}

py::object attribute(const py::object& object, const char* name) {
  return owned([&] { return PyObject_GetAttrString(object.ptr(), name); });
}

PyObject* reference(void* held) { return static_cast<PyObject*>(held); }

class TorchThroughPython final : public Torch {
 public:
  explicit TorchThroughPython(py::object access)
      : access_(std::move(access)),
        dispatch_keys_(access_.attr("dispatch_keys")),
        raw_repr_(access_.attr("raw_repr")),
        plain_keys_(access_.attr("PLAIN_KEYS").cast<uint64_t>()),
        device_keys_(access_.attr("DEVICE_KEYS").cast<uint64_t>()),
        frombuffer_(access_.attr("frombuffer")),
        uint8_(access_.attr("uint8")) {}

  Storage storage_of(py::handle storage) const override {
    const int is_storage = or_wait_for_exit([&] { return PyObject_IsInstance(storage.ptr(), storage_type_.ptr()); });
    if (is_storage < 0) throw py::error_already_set();
    if (is_storage == 0) throw py::type_error("expected torch.UntypedStorage");
    const py::object type = attribute(storage_device_(storage.ptr()), "type");
    const bool on_host = PyUnicode_CompareWithASCIIString(type.ptr(), "cpu") == 0;
    return Storage(*this, retain(storage.ptr()), on_host);
  }

  py::object storage_over(char* data, uint64_t nbytes, std::unique_ptr<ReadMemory> memory) const override {
    if (nbytes == 0) return call_method(access_, "no_bytes");  // torch.frombuffer refuses that
    const py::object buffer = memory_object(data, nbytes, std::move(memory));
    PyObject* const arguments[] = {nullptr, buffer.ptr(), uint8_.ptr()};
    py::object tensor = owned([&] {
      return PyObject_Vectorcall(frombuffer_.ptr(), arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                 dtype_only_.ptr());
    });
    py::object storage = untyped_storage_(tensor.ptr());
    drop(std::move(tensor));
    return storage;
  }

  bool is_plain(PyObject* tensor) const override {
    uint64_t keys = 0;
    return has_plain_keys(tensor, keys);
  }

  bool describe(PyObject* tensor, PlainTensor& described) const override {
    uint64_t keys = 0;
    if (!has_plain_keys(tensor, keys)) return false;
    const bool on_host = (keys & device_keys_) == 0;
    described.storage = Storage(*this, untyped_storage_(tensor).release().ptr(), on_host);
    described.storage_bytes = described.storage.bytes();
    const py::object dtype = dtype_(tensor);
    described.dtype = dtype;  // lives as long as torch
    described.itemsize = itemsize_of(dtype);
    described.storage_offset = storage_offset_(tensor);
    described.sizes = untracked(exact_tuple(size_(tensor)));
    described.strides = untracked(exact_tuple(stride_(tensor)));
    described.requires_grad = requires_grad_(tensor).ptr() == Py_True;
    return true;
  }

  std::unique_ptr<FixedStorages> fix(const std::vector<Storage>&) const override { return nullptr; }
  void forget_fixed() const override {}

  std::unique_ptr<SlotMemory> pin() const override {
    try {
      return in_python([&] { return pin_through_python(device_copies()); });
    } catch (const PythonError& error) {
      if (!error.is_exception()) throw;
      return nullptr;  // plain memory serves too
    }
  }

  std::unique_ptr<DeviceSource> source(const std::vector<DeviceBytes>& records) const override {
    return source_through_python(device_copies(), records);
  }

  std::unique_ptr<StorageDestination> destination(const std::string& device,
                                                  const std::vector<uint64_t>& sizes) const override {
    return destination_through_python(device_copies(), device, sizes);
  }

  std::unique_ptr<DeviceClones> clones(const std::vector<DeviceBytes>& originals) const override {
    return clones_through_python(device_copies(), *this, originals);
  }

  void* retain(void* held) const override { return Py_NewRef(reference(held)); }
  void release(void* held) const override {
    or_wait_for_exit([held] { Py_DECREF(reference(held)); });
  }
  const void* identity(void* held) const override { return as_pointer(cdata_(reference(held))); }

  StorageBytes bytes(void* held) const override {
    const void* const data = as_pointer(data_ptr_(reference(held)));
    return {static_cast<const char*>(data), as_uint64(nbytes_(reference(held)))};
  }

  std::string device(void* held) const override {
    const py::object device = storage_device_(reference(held));
    return owned([&] { return PyObject_Str(device.ptr()); }).cast<std::string>();
  }
  py::object object(void* held) const override { return py::reinterpret_borrow<py::object>(reference(held)); }

 private:
  // The bits by which LibTorch itself chooses how a tensor is handled.
  bool has_plain_keys(PyObject* tensor, uint64_t& keys) const {
    if (dispatch_keys_.is_none()) return false;
    const py::object key_set = owned([&] { return PyObject_CallOneArg(dispatch_keys_.ptr(), tensor); });
    keys = as_uint64(owned([&] { return PyObject_CallOneArg(raw_repr_.ptr(), key_set.ptr()); }));
    return (keys & ~plain_keys_) == 0;
  }

  int64_t itemsize_of(const py::object& dtype) const {
    if (dtype.ptr() != last_dtype_) {
      last_itemsize_ = static_cast<int64_t>(as_uint64(attribute(dtype, "itemsize")));
      last_dtype_ = dtype.ptr();
    }
    return last_itemsize_;
  }

  py::object device_copies() const { return call_method(access_, "device_copies"); }

  // None of this is ever destroyed.
  const py::object access_;
  const py::object dispatch_keys_;  // None where torch does not tell them
  const py::object raw_repr_;
  const uint64_t plain_keys_;
  const uint64_t device_keys_;
  const py::object frombuffer_;
  const py::object uint8_;
  const py::object dtype_only_ = py::make_tuple(owned(PyUnicode_InternFromString("dtype")));
  const py::object tensor_type_ = access_.attr("Tensor");
  const Method untyped_storage_{tensor_type_, "untyped_storage"};
  const Method storage_offset_{tensor_type_, "storage_offset"};
  const Method size_{tensor_type_, "size"};
  const Method stride_{tensor_type_, "stride"};
  const Attribute dtype_{tensor_type_, "dtype"};
  const Attribute requires_grad_{tensor_type_, "requires_grad"};
  const py::object storage_type_ = access_.attr("UntypedStorage");
  const Method data_ptr_{storage_type_, "data_ptr"};
  const Method nbytes_{storage_type_, "nbytes"};
  const Attribute cdata_{storage_type_, "_cdata"};
  const Attribute storage_device_{storage_type_, "device"};
  mutable PyObject* last_dtype_ = nullptr;
  mutable int64_t last_itemsize_ = 0;
};

}  // namespace

std::unique_ptr<const Torch> torch_through_python(py::object access) {
  return std::make_unique<TorchThroughPython>(std::move(access));
}

}  // namespace sdio
