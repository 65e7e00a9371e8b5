#include "core/storage_table.h"

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/owned.h"
#include "core/python_error.h"

namespace py = pybind11;

namespace sdio {
namespace {

// What a reduced tensor's arguments hold in place of objects that would only be made to be pickled: each is pickled as
// what it stands for. Its type is unknown to the cyclic collector, whose passes over the objects of 100,000 tensors
// would take long.
struct StandIn {
  enum For { kStorage, kNoHooks, kData };
  PyObject_HEAD For what;
  PyObject* object;  // kStorage: the persistent id; kNoHooks: null; kData: the parameter
};

void stand_in_dealloc(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  Py_XDECREF(reinterpret_cast<StandIn*>(self)->object);
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* stand_in_type = nullptr;  // made with the module, as memory_object.h says why

void make_stand_in_type() {
  if (stand_in_type != nullptr) return;
  PyType_Slot slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(&stand_in_dealloc)}, {0, nullptr}};
  PyType_Spec spec = {"statedict_io._core.StandIn", sizeof(StandIn), 0, Py_TPFLAGS_DEFAULT, slots};
  stand_in_type = reinterpret_cast<PyTypeObject*>(owned(PyType_FromSpec(&spec)).release().ptr());
}

bool is_stand_in(PyObject* obj) { return Py_TYPE(obj) == stand_in_type; }

PyObject* new_reference(py::object&& object) { return object.release().ptr(); }
PyObject* new_reference(const py::handle& object) { return Py_NewRef(object.ptr()); }

// PyTuple_Pack would count each reference up, and its caller down.
template <typename... Objects>
py::object pack(Objects&&... objects) {
  py::object tuple = owned([] { return PyTuple_New(sizeof...(Objects)); });
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(tuple.ptr(), i++, new_reference(std::forward<Objects>(objects))), ...);
  return untracked(std::move(tuple));
}

py::object stand_in(StandIn::For what, py::object object) {
  py::object made = owned(reinterpret_cast<PyObject*>(PyObject_New(StandIn, stand_in_type)));
  reinterpret_cast<StandIn*>(made.ptr())->what = what;
  reinterpret_cast<StandIn*>(made.ptr())->object = object.release().ptr();
  return made;
}

bool has_python_state(PyObject* obj) {
#if PY_VERSION_HEX < 0x030d0000
  PyObject** const slot = _PyObject_GetDictPtr(obj);
  if (slot != nullptr)
    return *slot != nullptr && PyDict_GET_SIZE(*slot) != 0;  // no dictionary is made to find it empty
#endif
  PyObject* const dict = or_wait_for_exit([&] { return PyObject_GenericGetDict(obj, nullptr); });
  if (dict == nullptr) {
    PyErr_Clear();
    return true;  // not the class we know: let torch look
  }
  const bool has = PyDict_GET_SIZE(dict) != 0;
  Py_DECREF(dict);
  return has;
}

// The objects that torch's own reduction writes into the stream or asks. They are the same for every save.
struct TensorReduction {
  const py::object tensor_type, parameter_type, ordered_dict, rebuild_tensor, rebuild_parameter;
  const py::dict storage_types;  // torch.dtype -> the class that stands for it in the stream
  const py::object location_tag;
  // Interned, as the literals in torch's code are, because the pickler's memo goes by identity.
  const py::object storage_word = owned(PyUnicode_InternFromString("storage"));
  const py::object cpu_word = owned(PyUnicode_InternFromString("cpu"));
  const py::object dtype_word = owned(PyUnicode_InternFromString("dtype"));
  const py::object requires_grad_word = owned(PyUnicode_InternFromString("requires_grad"));
  const py::object no_hooks = pack(ordered_dict, owned(PyTuple_New(0)));  // an empty OrderedDict, reduced
};

// There is one for each object that is pickled.
class StorageTable {
 public:
  StorageTable(std::shared_ptr<const TensorReduction> reduction, py::object reference)
      : torch_(std::move(reduction)), reference_(std::move(reference)) {}

  const std::vector<Storage>& storages() const { return storages_; }

  // The key of `storage`, the next one if it is new. Raises RuntimeError where the same bytes were seen as another
  // dtype.
  py::object key_of(const py::object& storage, const py::object& dtype) {
    Storage held = implementation_.storage_of(storage);
    const StorageBytes bytes = held.bytes();
    return key_of(std::move(held), bytes, dtype.ptr());
  }

  // A new reference: what the pickler writes instead of `obj`, or None.
  PyObject* persistent_id(PyObject* obj) {
    if (is_stand_in(obj)) {
      const StandIn* const stands = reinterpret_cast<StandIn*>(obj);
      return Py_NewRef(stands->what == StandIn::kStorage ? stands->object : Py_None);
    }
    if (is_never_storage(Py_TYPE(obj))) Py_RETURN_NONE;
    return or_wait_for_exit([&] { return PyObject_CallOneArg(reference_.ptr(), obj); });
  }

  // A new reference: how `obj` is pickled, or NotImplemented for Python to find out.
  PyObject* reduce(PyObject* obj) {
    if (is_stand_in(obj)) {
      const StandIn* const stands = reinterpret_cast<StandIn*>(obj);
      return stands->what == StandIn::kNoHooks ? Py_NewRef(torch_->no_hooks.ptr()) : reduce_data_of(stands->object);
    }
    PlainTensor tensor;
    if (Py_TYPE(obj) == reinterpret_cast<PyTypeObject*>(torch_->tensor_type.ptr())) {
      // A tensor that requires grad may have hooks that torch warns of.
      if (!has_python_state(obj) && implementation_.describe(obj, tensor) && !tensor.requires_grad) {
        PyObject* const storage_type = storage_type_of(tensor.dtype);
        if (storage_type != nullptr) return reduce_tensor(std::move(tensor), storage_type);
      }
    } else if (Py_TYPE(obj) == reinterpret_cast<PyTypeObject*>(torch_->parameter_type.ptr())) {
      if (!has_python_state(obj) && implementation_.is_plain(obj) && has_storage_type(obj)) {
        return reduce_parameter(obj);
      }
    }
    return Py_NewRef(Py_NotImplemented);
  }

 private:
  bool is_never_storage(PyTypeObject* type) const {
    // Classes include those with a metaclass, as torch's storage classes, which every tensor's reference names.
    constexpr unsigned long kBuiltIn = Py_TPFLAGS_UNICODE_SUBCLASS | Py_TPFLAGS_TUPLE_SUBCLASS |
                                       Py_TPFLAGS_LONG_SUBCLASS | Py_TPFLAGS_DICT_SUBCLASS | Py_TPFLAGS_LIST_SUBCLASS |
                                       Py_TPFLAGS_BYTES_SUBCLASS | Py_TPFLAGS_TYPE_SUBCLASS;
    return PyType_HasFeature(type, kBuiltIn) || type == &PyFloat_Type || type == Py_TYPE(Py_None) ||
           type == &PyFunction_Type || type == reinterpret_cast<PyTypeObject*>(torch_->tensor_type.ptr()) ||
           type == reinterpret_cast<PyTypeObject*>(torch_->parameter_type.ptr());
  }

  py::object key_of(Storage storage, const StorageBytes& bytes, PyObject* dtype) {
    if (bytes.data != nullptr) {
      const auto [seen, is_new] = dtypes_.emplace(bytes.data, dtype);
      if (!is_new && seen->second != dtype) {
        PyErr_SetString(PyExc_RuntimeError,
                        "Cannot save multiple tensors or storages that view the same data as different types");
        throw py::error_already_set();
      }
    }
    const auto [entry, is_new] = keys_.try_emplace(storage.identity());
    if (is_new) {
      entry->second = owned(PyObject_Str(owned(PyLong_FromSize_t(storages_.size())).ptr()));
      storages_.push_back(std::move(storage));
    }
    return entry->second;
  }

  // Null for newer dtypes, which have no storage type and are reduced in another way.
  PyObject* storage_type_of(py::handle dtype) const { return PyDict_GetItem(torch_->storage_types.ptr(), dtype.ptr()); }

  bool has_storage_type(PyObject* tensor) const {
    return storage_type_of(owned([&] { return PyObject_GetAttr(tensor, torch_->dtype_word.ptr()); })) != nullptr;
  }

  PyObject* reduce_data_of(PyObject* parameter) {
    PlainTensor data;
    // It was plain when the parameter was reduced.
    if (!implementation_.describe(parameter, data)) throw std::runtime_error("a parameter has changed its kind");
    PyObject* const storage_type = storage_type_of(data.dtype);
    return reduce_tensor(std::move(data), storage_type);
  }

  PyObject* reduce_tensor(PlainTensor tensor, PyObject* storage_type) {
    const StorageBytes bytes = tensor.storage_bytes;
    const py::object location =
        tensor.storage.on_host() ? torch_->cpu_word : call_python(torch_->location_tag, tensor.storage.object());
    const py::object key = key_of(std::move(tensor.storage), bytes, tensor.dtype.ptr());
    py::object numel = owned(PyLong_FromUnsignedLongLong(bytes.nbytes / static_cast<uint64_t>(tensor.itemsize)));
    py::object id = pack(torch_->storage_word, py::handle(storage_type), key, location, std::move(numel));

    py::object args =
        pack(stand_in(StandIn::kStorage, std::move(id)), std::move(tensor.storage_offset), std::move(tensor.sizes),
             std::move(tensor.strides), py::handle(Py_False), stand_in(StandIn::kNoHooks, py::object()));
    return pack(torch_->rebuild_tensor, std::move(args)).release().ptr();
  }

  PyObject* reduce_parameter(PyObject* parameter) const {
    py::object requires_grad = owned([&] { return PyObject_GetAttr(parameter, torch_->requires_grad_word.ptr()); });
    py::object args = pack(stand_in(StandIn::kData, py::reinterpret_borrow<py::object>(parameter)),
                           std::move(requires_grad), stand_in(StandIn::kNoHooks, py::object()));
    return pack(torch_->rebuild_parameter, std::move(args)).release().ptr();
  }

  const std::shared_ptr<const TensorReduction> torch_;
  const py::object reference_;  // the same as persistent_id, for objects that may be storages
  const Torch& implementation_ = torch();
  std::unordered_map<const void*, py::object> keys_;  // by the storages' identities
  std::unordered_map<const void*, PyObject*> dtypes_;
  std::vector<Storage> storages_;
};

// Plain C functions with the table in a capsule: pybind11's dispatch would cost more than the work, and the pickler
// asks about every object it meets.
constexpr char kCapsuleName[] = "statedict_io._core.StorageTable";

template <PyObject* (StorageTable::*method)(PyObject*)>
PyObject* call(PyObject* capsule, PyObject* obj) {
  try {
    return (static_cast<StorageTable*>(PyCapsule_GetPointer(capsule, kCapsuleName))->*method)(obj);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

PyMethodDef persistent_id_method = {"persistent_id", &call<&StorageTable::persistent_id>, METH_O, nullptr};
PyMethodDef reduce_method = {"reduce", &call<&StorageTable::reduce>, METH_O, nullptr};

// The function keeps the capsule alive, the capsule the table.
py::object function_of(const py::object& table, PyMethodDef* method) {
  const py::object capsule = owned(PyCapsule_New(&table.cast<StorageTable&>(), kCapsuleName, [](PyObject* dying) {
    Py_XDECREF(static_cast<PyObject*>(PyCapsule_GetContext(dying)));
  }));
  PyCapsule_SetContext(capsule.ptr(), table.inc_ref().ptr());
  return owned(PyCFunction_New(method, capsule.ptr()));
}

}  // namespace

std::vector<Storage> storages_of(const py::object& table_or_list) {
  if (py::isinstance<StorageTable>(table_or_list)) return table_or_list.cast<const StorageTable&>().storages();
  std::vector<Storage> storages;
  for (const py::handle storage : table_or_list.cast<py::list>()) {
    storages.push_back(torch().storage_of(storage));
    storages.back().bytes();
  }
  return storages;
}

void bind_storage_table(py::module_& module) {
  make_stand_in_type();
  py::class_<TensorReduction, std::shared_ptr<TensorReduction>>(module, "TensorReduction")
      .def(py::init([](py::object tensor_type, py::object parameter_type, py::object ordered_dict,
                       py::object rebuild_tensor, py::object rebuild_parameter, py::dict storage_types,
                       py::object location_tag) {
             return std::shared_ptr<TensorReduction>(new TensorReduction{
                 std::move(tensor_type), std::move(parameter_type), std::move(ordered_dict), std::move(rebuild_tensor),
                 std::move(rebuild_parameter), std::move(storage_types), std::move(location_tag)});
           }),
           py::kw_only(), py::arg("tensor_type"), py::arg("parameter_type"), py::arg("ordered_dict"),
           py::arg("rebuild_tensor"), py::arg("rebuild_parameter"), py::arg("storage_types"), py::arg("location_tag"));

  py::class_<StorageTable>(module, "StorageTable")
      .def(py::init([](std::shared_ptr<TensorReduction> reduction, py::object reference) {
             return std::make_unique<StorageTable>(std::move(reduction), std::move(reference));
           }),
           py::arg("reduction"), py::arg("reference"))
      .def_property_readonly("storages",
                             [](const StorageTable& table) {
                               const std::vector<Storage>& storages = table.storages();
                               py::list wrapped = list_of(storages.size(), [](size_t) { return Py_NewRef(Py_None); });
                               for (size_t i = 0; i < storages.size(); ++i) wrapped[i] = storages[i].object();
                               return wrapped;
                             })
      .def("key_of", py::overload_cast<const py::object&, const py::object&>(&StorageTable::key_of), py::arg("storage"),
           py::arg("dtype"))
      .def_property_readonly("persistent_id",
                             [](const py::object& self) { return function_of(self, &persistent_id_method); })
      .def_property_readonly("reduce", [](const py::object& self) { return function_of(self, &reduce_method); });
}

}  // namespace sdio
