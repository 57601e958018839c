// The Python module moe_infinity.kernels._native. Pointers and sizes come in as plain numbers: who
// calls vouches for them (kernels/native.py does).
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "engine.hpp"

namespace {

using moe::Call;
using moe::Engine;
using moe::Kernels;
using moe::Matrix;

constexpr const char *kCapsule = "moe_infinity.Engine";

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> found;
    for (const Kernels *k : {moe::portable_kernels(), moe::avx2_kernels(), moe::avx512_kernels(),
                             moe::avx512_bf16_kernels()})
        if (k) found.push_back(k);
    return found;
}

Engine *engine_of(PyObject *capsule) {
    return static_cast<Engine *>(PyCapsule_GetPointer(capsule, kCapsule));
}

void destroy(PyObject *capsule) { delete engine_of(capsule); }

// The bytes of a Python buffer, which may lie unaligned; false with a Python error set.
template <class T>
bool copy_buffer(PyObject *from, std::vector<T> &to) {
    Py_buffer bytes;
    if (PyObject_GetBuffer(from, &bytes, PyBUF_SIMPLE) < 0) return false;
    const auto size = static_cast<size_t>(bytes.len);
    bool copied = false;
    if (size % sizeof(T) != 0) {
        PyErr_Format(PyExc_ValueError, "buffer: got %zu bytes, expected a multiple of %zu", size,
                     sizeof(T));
    } else {
        try {
            to.resize(size / sizeof(T));
            if (size) std::memcpy(static_cast<void *>(to.data()), bytes.buf, size);
            copied = true;
        } catch (const std::exception &) {
            PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&bytes);
    return copied;
}

// The one value that a Python buffer holds.
template <class T>
bool copy_one(PyObject *from, T &to) {
    std::vector<T> found;
    if (!copy_buffer(from, found)) return false;
    if (found.size() != 1) {
        PyErr_Format(PyExc_ValueError, "buffer: got %zu values, expected one", found.size());
        return false;
    }
    to = found[0];
    return true;
}

bool has_arguments(Py_ssize_t got, Py_ssize_t expected, const char *signature) {
    if (got != expected) PyErr_SetString(PyExc_TypeError, signature);
    return got == expected;
}

// Runs without the GIL; a C++ exception becomes a Python one. Whether there was none.
template <class Body>
bool is_run(const Body &body) {
    std::string error;
    Py_BEGIN_ALLOW_THREADS
    try {
        body();
    } catch (const std::exception &caught) {
        error = caught.what();
    }
    Py_END_ALLOW_THREADS
    if (!error.empty()) PyErr_SetString(PyExc_MemoryError, error.c_str());
    return error.empty();
}

template <class Body>
PyObject *without_gil(const Body &body) {
    if (!is_run(body)) return nullptr;
    Py_RETURN_NONE;
}

PyObject *instruction_sets(PyObject *, PyObject *) {
    PyObject *names = PyList_New(0);
    if (!names) return nullptr;
    for (const Kernels *k : available()) {
        PyObject *name = PyUnicode_FromString(k->name);
        if (!name || PyList_Append(names, name) < 0) {
            Py_XDECREF(name);
            Py_XDECREF(names);
            return nullptr;
        }
        Py_DECREF(name);
    }
    return names;
}

PyObject *open_engine(PyObject *, PyObject *args) {
    int num_threads;
    const char *name;
    if (!PyArg_ParseTuple(args, "is", &num_threads, &name)) return nullptr;
    for (const Kernels *k : available()) {
        if (std::strcmp(k->name, name) != 0) continue;
        Engine *engine = nullptr;
        try {
            engine = new Engine(num_threads, *k);
        } catch (const std::exception &caught) {
            PyErr_SetString(PyExc_RuntimeError, caught.what());
            return nullptr;
        }
        PyObject *capsule = PyCapsule_New(engine, kCapsule, destroy);
        if (!capsule) delete engine;
        return capsule;
    }
    PyErr_Format(PyExc_ValueError, "this processor has no instruction set %s", name);
    return nullptr;
}

PyObject *run(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 2, "run(engine, calls)")) return nullptr;
    Engine *engine = engine_of(args[0]);
    std::vector<Call> calls;
    if (!engine || !copy_buffer(args[1], calls)) return nullptr;
    return without_gil([&] { engine->run(calls.data(), calls.size()); });
}

PyObject *product(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 7, "product(engine, matrix, x, num_tokens, type, out, bias)"))
        return nullptr;
    Engine *engine = engine_of(args[0]);
    Matrix matrix;
    if (!engine || !copy_one(args[1], matrix)) return nullptr;
    void *x = PyLong_AsVoidPtr(args[2]);
    const auto num_tokens = static_cast<uint32_t>(PyLong_AsUnsignedLong(args[3]));
    const auto type = static_cast<moe::Type>(PyLong_AsUnsignedLong(args[4]));
    void *out = PyLong_AsVoidPtr(args[5]);
    const void *bias = PyLong_AsVoidPtr(args[6]);
    if (PyErr_Occurred()) return nullptr;
    return without_gil([&] { engine->product(matrix, x, num_tokens, type, out, bias); });
}

PyObject *attend(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 3, "attend(engine, block, token)")) return nullptr;
    Engine *engine = engine_of(args[0]);
    moe::Block block;
    moe::Token token;
    if (!engine || !copy_one(args[1], block) || !copy_one(args[2], token)) return nullptr;
    return without_gil([&] { engine->attend(block, token); });
}

// A call that takes an engine and one struct of its own.
template <class T>
PyObject *with_one(PyObject *const *args, Py_ssize_t count, const char *signature,
                   void (Engine::*method)(const T &)) {
    if (!has_arguments(count, 2, signature)) return nullptr;
    Engine *engine = engine_of(args[0]);
    T one;
    if (!engine || !copy_one(args[1], one)) return nullptr;
    return without_gil([&] { (engine->*method)(one); });
}

PyObject *sum(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return with_one(args, count, "sum(engine, sum)", &Engine::sum);
}

PyObject *finish(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return with_one(args, count, "finish(engine, tail)", &Engine::finish);
}

PyObject *settle(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 1, "settle(engine)")) return nullptr;
    Engine *engine = engine_of(args[0]);
    if (!engine) return nullptr;
    moe::Spent spent{};
    if (!is_run([&] { spent = engine->settle(); })) return nullptr;
    return Py_BuildValue("dd", spent.experts_s, spent.dense_s);
}

PyObject *attend_latents(PyObject *, PyObject *const *args, Py_ssize_t count) {
    return with_one(args, count, "attend_latents(engine, latent)", &Engine::attend_latents);
}

PyObject *run_ahead(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 4, "run_ahead(engine, stages, count, tail)")) return nullptr;
    Engine *engine = engine_of(args[0]);
    auto *stages = static_cast<moe::Stage *>(PyLong_AsVoidPtr(args[1]));
    const size_t num_stages = PyLong_AsSize_t(args[2]);
    if (!engine || PyErr_Occurred()) return nullptr;
    moe::Tail tail;
    const bool has_tail = args[3] != Py_None;
    if (has_tail && !copy_one(args[3], tail)) return nullptr;
    size_t done = 0;
    const bool is_well =
        is_run([&] { done = engine->run_ahead(stages, num_stages, has_tail ? &tail : nullptr); });
    return is_well ? PyLong_FromSize_t(done) : nullptr;
}

// The weights that stream by push all else out of the processor's caches: dictionaries are on their
// way together before one after the other is looked at.
bool fetch_dictionaries(PyObject *all) {
    const Py_ssize_t count = PyTuple_GET_SIZE(all);
    for (Py_ssize_t i = 0; i < count; ++i) __builtin_prefetch(PyTuple_GET_ITEM(all, i));
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!PyDict_Check(PyTuple_GET_ITEM(all, i))) {
            PyErr_SetString(PyExc_TypeError, "expected a tuple of dictionaries");
            return false;
        }
        const auto *dictionary = reinterpret_cast<PyDictObject *>(PyTuple_GET_ITEM(all, i));
        if (dictionary->ma_used == 0) continue;
        for (size_t line = 0; line < 4; ++line)
            __builtin_prefetch(reinterpret_cast<const char *>(dictionary->ma_keys) + 64 * line);
        __builtin_prefetch(dictionary->ma_values);
    }
    return true;
}

PyObject *filled(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 1, "filled(dictionaries)")) return nullptr;
    if (!PyTuple_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "expected a tuple of dictionaries");
        return nullptr;
    }
    if (!fetch_dictionaries(args[0])) return nullptr;
    PyObject *found = PyList_New(0);
    for (Py_ssize_t i = 0; found && i < PyTuple_GET_SIZE(args[0]); ++i) {
        PyObject *dictionary = PyTuple_GET_ITEM(args[0], i);
        if (PyDict_Size(dictionary) > 0 && PyList_Append(found, dictionary) < 0) Py_CLEAR(found);
    }
    return found;
}

// Asked at every token of hundreds of values: what Python takes for each adds up.
PyObject *are_kept(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!has_arguments(count, 3, "are_kept(dictionaries, names, values)")) return nullptr;
    for (Py_ssize_t i = 0; i < 3; ++i) {
        if (PyTuple_Check(args[i]) && PyTuple_GET_SIZE(args[i]) == PyTuple_GET_SIZE(args[0])) continue;
        PyErr_SetString(PyExc_TypeError, "are_kept: expected three tuples of one length");
        return nullptr;
    }
    if (!fetch_dictionaries(args[0])) return nullptr;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); ++i) {
        PyObject *dictionary = PyTuple_GET_ITEM(args[0], i);
        PyObject *now = PyDict_GetItemWithError(dictionary, PyTuple_GET_ITEM(args[1], i));
        if (!now && PyErr_Occurred()) return nullptr;
        if ((now ? now : Py_None) != PyTuple_GET_ITEM(args[2], i)) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

template <class Function>
PyCFunction as_function(Function f) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS,
     "Names of the instruction sets that this processor has, the best last."},
    {"open", open_engine, METH_VARARGS, "open(num_threads, instruction_set): its threads end with it."},
    {"run", as_function(run), METH_FASTCALL, "run(engine, calls): see engine.hpp for their layout."},
    {"product", as_function(product), METH_FASTCALL,
     "product(engine, matrix, x, num_tokens, type, out, bias): bias is 0 or an address."},
    {"attend", as_function(attend), METH_FASTCALL,
     "attend(engine, block, token): see block.hpp for their layout."},
    {"sum", as_function(sum), METH_FASTCALL, "sum(engine, sum): see block.hpp for its layout."},
    {"finish", as_function(finish), METH_FASTCALL,
     "finish(engine, tail): see block.hpp for its layout."},
    {"settle", as_function(settle), METH_FASTCALL,
     "settle(engine): what was begun is done; seconds that its experts took, and what follows."},
    {"attend_latents", as_function(attend_latents), METH_FASTCALL,
     "attend_latents(engine, latent): see block.hpp for its layout."},
    {"run_ahead", as_function(run_ahead), METH_FASTCALL,
     "run_ahead(engine, stages, count, tail): stages at an address, see engine.hpp; how many were run"
     " whole. What was only begun is done at the engine's next call."},
    {"are_kept", as_function(are_kept), METH_FASTCALL,
     "are_kept(dictionaries, names, values): whether each holds that very object under its name;"
     " None: or nothing."},
    {"filled", as_function(filled), METH_FASTCALL, "filled(dictionaries): those that are not empty."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
