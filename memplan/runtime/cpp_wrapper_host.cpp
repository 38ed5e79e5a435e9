#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using Handle = void*;
struct Call;
struct Host {
  int32_t (*python)(Call*, int32_t, const Handle*, int32_t, const int64_t*, int32_t, const int32_t*, int32_t, Handle*,
                    int32_t, int64_t*, int32_t);
  void (*release)(Call*, int32_t);
};
struct Kernel {
  void* function;
  int64_t threads;
  int32_t shared, early;
  int64_t grid, blocks[3];
  void* context;
};
struct Graph {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  PyObject* dict;
  PyObject *resolve, *prepare, *constants, *outputs, *library;
  PyObject** lines;
  Py_ssize_t line_count, input_count, tensor_count, number_count;
  char* kinds;
  Kernel* kernels;
  Handle* constant_handles;
  int32_t (*run)(Call*);
};
// the first fields are what wrappers know (cpp_wrapper_prelude.h)
struct Call {
  const Host* host;
  const Kernel* kernels;
  const Handle* constants;
  Handle* inputs;
  const int64_t* numbers;
  Handle* outputs;
  int64_t* numbers_out;
  const char *failed, *reason;
  int32_t step;
  Graph* graph;
  PyObject** objects;
  PyThreadState* thread;
  void** slots;
};

PyTypeObject* tensor_type;
PyObject* cdata_name;
PyObject* (*wrap)(const void*);
int32_t (*delete_handle)(Handle);
int32_t (*new_handle)(Handle, Handle*);
const char* (*what)();
Py_ssize_t offset = 0;  // of the pointer to the implementation, in a Python tensor; 0 where it is not known

// The handle of a Python tensor, borrowed: `slot` holds the pointer where the tensor's own cannot be pointed at.
bool handle_of(PyObject* object, void** slot, Handle* out) {
  if (!PyObject_TypeCheck(object, tensor_type)) {
    PyErr_Format(PyExc_TypeError, "a compiled graph got %s where it takes a tensor", Py_TYPE(object)->tp_name);
    return false;
  }
  if (offset) {
    *out = reinterpret_cast<char*>(object) + offset;
    return true;
  }
  PyObject* number = PyObject_GetAttr(object, cdata_name);
  if (!number) return false;
  *slot = PyLong_AsVoidPtr(number);
  Py_DECREF(number);
  *out = slot;
  return !PyErr_Occurred();
}

PyObject* line_function(Graph* graph, int32_t line) {
  if (line < 0 || line >= graph->line_count) {
    PyErr_SetString(PyExc_SystemError, "a wrapper asks for a line that it does not have");
    return nullptr;
  }
  if (!graph->lines[line]) graph->lines[line] = PyObject_CallFunction(graph->resolve, "i", line);
  return graph->lines[line];
}

bool run_line(Call* call, int32_t line, const Handle* tensors, int32_t tensor_count, const int64_t* numbers,
              int32_t number_count, const int32_t* objects, int32_t object_count, Handle* made, int32_t made_count,
              int64_t* known, int32_t known_count) {
  PyObject* function = line_function(call->graph, line);
  if (!function) return false;
  const Py_ssize_t count = tensor_count + number_count + object_count;
  PyObject** args = static_cast<PyObject**>(PyMem_Malloc(sizeof(PyObject*) * (count + 1)));
  if (!args) return PyErr_NoMemory(), false;
  Py_ssize_t n = 0;
  bool good = true;
  for (int32_t i = 0; good && i < tensor_count; ++i) {
    if (!tensors[i]) Py_INCREF(args[n++] = Py_None);
    else good = (args[n] = wrap(tensors[i])) && ++n;
  }
  for (int32_t i = 0; good && i < number_count; ++i) good = (args[n] = PyLong_FromLongLong(numbers[i])) && ++n;
  for (int32_t i = 0; good && i < object_count; ++i) {
    args[n] = call->objects[objects[i]];
    Py_INCREF(args[n++]);
  }
  PyObject* out = good ? PyObject_Vectorcall(function, args, n, nullptr) : nullptr;
  for (Py_ssize_t i = 0; i < n; ++i) Py_DECREF(args[i]);
  PyMem_Free(args);
  if (!out) return false;
  const Py_ssize_t results = made_count + known_count;
  good = !results || (PyTuple_Check(out) && PyTuple_GET_SIZE(out) == results);
  if (!good) PyErr_Format(PyExc_SystemError, "line %d of a wrapper did not give its %zd results", line, results);
  for (int32_t i = 0; good && i < made_count; ++i) {
    void* slot;
    Handle borrowed;
    good = handle_of(PyTuple_GET_ITEM(out, i), &slot, &borrowed);
    if (good && new_handle(borrowed, &made[i])) PyErr_NoMemory(), good = false;
  }
  for (int32_t i = 0; good && i < known_count; ++i) {
    PyObject* number = PyNumber_Index(PyTuple_GET_ITEM(out, made_count + i));
    good = number != nullptr;
    if (good) known[i] = PyLong_AsLongLong(number), good = !PyErr_Occurred();
    Py_XDECREF(number);
  }
  Py_DECREF(out);
  if (!good)
    for (int32_t i = 0; i < made_count; ++i) {
      if (made[i]) delete_handle(made[i]);
      made[i] = nullptr;
    }
  return good;
}

int32_t host_python(Call* call, int32_t line, const Handle* tensors, int32_t tensor_count, const int64_t* numbers,
                    int32_t number_count, const int32_t* objects, int32_t object_count, Handle* made,
                    int32_t made_count, int64_t* known, int32_t known_count) {
  PyEval_RestoreThread(call->thread);
  // a function of torch that failed may have left Python's error set (a GPU that is out of memory does): the line does
  // the same again, and says itself what is wrong
  PyErr_Clear();
  const bool good = run_line(call, line, tensors, tensor_count, numbers, number_count, objects, object_count, made,
                             made_count, known, known_count);
  call->thread = PyEval_SaveThread();
  return good ? 0 : 1;
}

void let_go(Call* call, Py_ssize_t input);

void host_release(Call* call, int32_t input) {
  PyEval_RestoreThread(call->thread);
  let_go(call, input);
  Py_CLEAR(call->objects[input]);
  call->inputs[input] = nullptr;
  call->thread = PyEval_SaveThread();
}

const Host host = {host_python, host_release};

// An input that torch's functions are given is held by a handle of its own: torch takes the interpreter's lock whenever
// a tensor that Python alone holds gains a holder, and loses it again.
bool hold(Call* call, Py_ssize_t input) {
  Handle own = nullptr;
  if (new_handle(call->inputs[input], &own)) return PyErr_NoMemory(), false;
  call->slots[input] = call->inputs[input] = own;
  return true;
}

void let_go(Call* call, Py_ssize_t input) {
  if (call->graph->kinds[input] != 'h' || !call->slots[input]) return;
  delete_handle(call->slots[input]);
  call->slots[input] = nullptr;
}

bool fill_kernels(Graph* graph) {
  if (!graph->prepare) return true;
  PyObject* rows = PyObject_CallNoArgs(graph->prepare);
  if (!rows) return false;
  const Py_ssize_t count = PyTuple_Check(rows) ? PyTuple_GET_SIZE(rows) : 0;
  graph->kernels = static_cast<Kernel*>(PyMem_Calloc(count + 1, sizeof(Kernel)));
  bool good = graph->kernels != nullptr;
  for (Py_ssize_t i = 0; good && i < count; ++i) {
    unsigned long long function = 0;
    Kernel& k = graph->kernels[i];
    unsigned long long context = 0;
    int shared = 0, early = 0;
    long long threads = 0, f[4] = {};
    good = PyArg_ParseTuple(PyTuple_GET_ITEM(rows, i), "KLiiLLLLK", &function, &threads, &shared, &early, f, f + 1, f + 2,
                            f + 3, &context);
    k = {reinterpret_cast<void*>(function), threads, shared, early, f[0], {f[1], f[2], f[3]},
         reinterpret_cast<void*>(context)};
  }
  Py_DECREF(rows);
  if (good) Py_CLEAR(graph->prepare);
  return good;
}

// The error says what failed, and has the number of the plan's step as `memplan_step`.
void say_failure(Call* call) {
  if (!PyErr_Occurred()) {
    const char* text = call->reason ? call->reason : what ? what() : "";
    PyErr_Format(PyExc_RuntimeError, "a compiled graph failed in %s%s%s", call->failed ? call->failed : "its wrapper",
                 text && *text ? ": " : "", text ? text : "");
  }
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  PyObject* step = PyLong_FromLong(call->step);
  if (!step || !value || PyObject_SetAttrString(value, "memplan_step", step)) PyErr_Clear();  // some take no attributes
  Py_XDECREF(step);
  PyErr_Restore(type, value, trace);
}

PyObject* results(Graph* graph, Call* call) {
  const Py_ssize_t count = PyTuple_GET_SIZE(graph->outputs);
  PyObject* out = PyTuple_New(count);
  for (Py_ssize_t i = 0; out && i < count; ++i) {
    PyObject* pair = PyTuple_GET_ITEM(graph->outputs, i);  // (kind, position or value)
    const long kind = PyLong_AsLong(PyTuple_GET_ITEM(pair, 0));
    PyObject* value = PyTuple_GET_ITEM(pair, 1);
    PyObject* item = nullptr;
    if (kind == 0) item = wrap(call->outputs[PyLong_AsSsize_t(value)]);
    if (kind == 1) item = PyLong_FromLongLong(call->numbers_out[PyLong_AsSsize_t(value)]);
    if (kind == 2) Py_XINCREF(item = call->objects[PyLong_AsSsize_t(value)]);
    if (kind == 3) Py_INCREF(item = value);
    if (!item) {
      Py_CLEAR(out);
      break;
    }
    PyTuple_SET_ITEM(out, i, item);
  }
  return out;
}

PyObject* graph_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  Graph* graph = reinterpret_cast<Graph*>(self);
  const Py_ssize_t n = graph->input_count;
  if (PyVectorcall_NARGS(flags) != 1 || names || !PyList_Check(args[0]) || PyList_GET_SIZE(args[0]) != n) {
    PyErr_Format(PyExc_TypeError, "a compiled graph is called with one list of its %zd arguments", n);
    return nullptr;
  }
  if (!fill_kernels(graph)) return nullptr;
  const size_t words = 4 * n + graph->tensor_count + graph->number_count + 1;
  void* few[256];
  void** memory = words <= 256 ? few : static_cast<void**>(PyMem_Malloc(sizeof(void*) * words));
  if (!memory) return PyErr_NoMemory();
  std::memset(memory, 0, sizeof(void*) * words);
  Call call = {&host, graph->kernels, graph->constant_handles, memory + n, reinterpret_cast<int64_t*>(memory + 2 * n),
               memory + 4 * n, reinterpret_cast<int64_t*>(memory + 4 * n + graph->tensor_count), nullptr, nullptr, 0,
               graph, reinterpret_cast<PyObject**>(memory + 3 * n), nullptr, memory};
  Py_INCREF(self);
  bool good = true;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PyList_GET_ITEM(args[0], i);
    Py_INCREF(item);
    call.objects[i] = item;
    if (!good) continue;
    if (graph->kinds[i] == 'e' && item == Py_None) continue;  // tokens of effects have no bytes, and may be None
    if (graph->kinds[i] == 't' || graph->kinds[i] == 'e') {
      good = handle_of(item, memory + i, call.inputs + i);
    } else if (graph->kinds[i] == 'h') {
      void* slot;
      good = handle_of(item, &slot, call.inputs + i) && hold(&call, i);
    } else if (graph->kinds[i] == 'n') {
      const int64_t value = PyLong_AsLongLong(item);
      if (value == -1 && PyErr_Occurred()) good = false;
      const_cast<int64_t*>(call.numbers)[i] = value;
    }
  }
  if (PyList_SetSlice(args[0], 0, n, nullptr)) good = false;
  PyObject* out = nullptr;
  if (good) {
    call.thread = PyEval_SaveThread();
    const int32_t status = graph->run(&call);
    PyEval_RestoreThread(call.thread);
    if (status) say_failure(&call);
    else out = results(graph, &call);
  }
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  for (Py_ssize_t i = 0; i < graph->tensor_count; ++i)
    if (call.outputs[i]) delete_handle(call.outputs[i]);
  for (Py_ssize_t i = 0; i < n; ++i) {
    let_go(&call, i);
    Py_XDECREF(call.objects[i]);
  }
  PyErr_Restore(type, value, trace);
  if (memory != few) PyMem_Free(memory);
  Py_DECREF(self);
  return out;
}

void graph_free(PyObject* self) {
  Graph* graph = reinterpret_cast<Graph*>(self);
  for (Py_ssize_t i = 0; i < graph->line_count; ++i) Py_XDECREF(graph->lines[i]);
  Py_XDECREF(graph->dict);
  Py_XDECREF(graph->resolve);
  Py_XDECREF(graph->prepare);
  Py_XDECREF(graph->outputs);
  Py_XDECREF(graph->library);
  for (Py_ssize_t i = 0; graph->constants && i < PyTuple_GET_SIZE(graph->constants); ++i)
    if (graph->constant_handles[i]) delete_handle(graph->constant_handles[i]);
  Py_XDECREF(graph->constants);
  PyMem_Free(graph->lines);
  PyMem_Free(graph->kinds);
  PyMem_Free(graph->kernels);
  PyMem_Free(graph->constant_handles);
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
}

PyGetSetDef attributes[] = {{"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
                            {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyTypeObject graph_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

// graph(run, kinds, outputs, tensors, numbers, constants, lines, resolve, prepare, library)
PyObject* make_graph(PyObject*, PyObject* args) {
  unsigned long long run;
  const char* kinds;
  Py_ssize_t inputs, tensors, numbers, lines;
  PyObject *outputs, *constants, *resolve, *prepare, *library;
  if (!PyArg_ParseTuple(args, "Ks#O!nnO!nOOO", &run, &kinds, &inputs, &PyTuple_Type, &outputs, &tensors, &numbers,
                        &PyTuple_Type, &constants, &lines, &resolve, &prepare, &library))
    return nullptr;
  Graph* graph = PyObject_New(Graph, &graph_type);
  if (!graph) return nullptr;
  std::memset(reinterpret_cast<char*>(graph) + sizeof(PyObject), 0, sizeof(Graph) - sizeof(PyObject));
  graph->vectorcall = graph_call;
  graph->dict = PyDict_New();
  Py_INCREF(graph->outputs = outputs);
  Py_INCREF(graph->constants = constants);
  Py_INCREF(graph->resolve = resolve);
  Py_INCREF(graph->prepare = prepare);
  Py_INCREF(graph->library = library);
  const Py_ssize_t held = PyTuple_GET_SIZE(constants);
  graph->lines = static_cast<PyObject**>(PyMem_Calloc(lines + 1, sizeof(PyObject*)));
  graph->kinds = static_cast<char*>(PyMem_Calloc(inputs + 1, 1));
  graph->constant_handles = static_cast<Handle*>(PyMem_Calloc(held + 1, sizeof(Handle)));
  bool good = graph->dict && graph->lines && graph->kinds && graph->constant_handles;
  if (good) {
    std::memcpy(graph->kinds, kinds, inputs);
    graph->line_count = lines, graph->input_count = inputs, graph->tensor_count = tensors;
    graph->number_count = numbers;
    graph->run = reinterpret_cast<int32_t (*)(Call*)>(run);
    for (Py_ssize_t i = 0; good && i < held; ++i) {
      void* slot;
      Handle borrowed;
      good = handle_of(PyTuple_GET_ITEM(constants, i), &slot, &borrowed) &&
             !new_handle(borrowed, &graph->constant_handles[i]);
    }
  }
  if (!good) {
    if (!PyErr_Occurred()) PyErr_NoMemory();
    Py_CLEAR(graph);
  }
  return reinterpret_cast<PyObject*>(graph);
}

// start(TensorBase, (two tensors), wrap, delete_handle, new_handle, what)
PyObject* start(PyObject*, PyObject* args) {
  PyObject *type, *samples;
  unsigned long long functions[4];
  if (!PyArg_ParseTuple(args, "OO!KKKK", &type, &PyTuple_Type, &samples, functions, functions + 1, functions + 2,
                        functions + 3))
    return nullptr;
  Py_INCREF(type);
  tensor_type = reinterpret_cast<PyTypeObject*>(type);
  wrap = reinterpret_cast<PyObject* (*)(const void*)>(functions[0]);
  delete_handle = reinterpret_cast<int32_t (*)(Handle)>(functions[1]);
  new_handle = reinterpret_cast<int32_t (*)(Handle, Handle*)>(functions[2]);
  what = reinterpret_cast<const char* (*)()>(functions[3]);
  if (!(cdata_name = PyUnicode_InternFromString("_cdata"))) return nullptr;
  Py_ssize_t found = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(samples); ++i) {
    PyObject* sample = PyTuple_GET_ITEM(samples, i);
    PyObject* number = PyObject_GetAttr(sample, cdata_name);
    if (!number) return nullptr;
    void* wanted = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    Py_ssize_t here = 0;
    for (Py_ssize_t at = sizeof(PyObject); !here && at + 8 <= Py_TYPE(sample)->tp_basicsize && at < 48; at += 8) {
      void* value;
      std::memcpy(&value, reinterpret_cast<char*>(sample) + at, sizeof value);
      if (value == wanted) here = at;
    }
    if (i && here != found) here = found = 0;
    found = here;
    if (!here) break;
  }
  offset = found;
  return PyLong_FromSsize_t(offset);
}

PyMethodDef methods[] = {{"graph", make_graph, METH_VARARGS, nullptr},
                         {"start", start, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "memplan_wrapper_host", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_memplan_wrapper_host() {
  graph_type.tp_name = "memplan.CompiledGraph";
  graph_type.tp_basicsize = sizeof(Graph);
  graph_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  graph_type.tp_vectorcall_offset = offsetof(Graph, vectorcall);
  graph_type.tp_call = PyVectorcall_Call;
  graph_type.tp_dealloc = graph_free;
  graph_type.tp_dictoffset = offsetof(Graph, dict);
  graph_type.tp_getset = attributes;
  graph_type.tp_getattro = PyObject_GenericGetAttr;
  graph_type.tp_setattro = PyObject_GenericSetAttr;
  if (PyType_Ready(&graph_type)) return nullptr;
  return PyModule_Create(&definition);
}
