// Runs a model that memplan.save wrote, on a CPU, in a program without Python.
//
//     memplan::Model model("model.memplan");
//     std::vector<memplan::Tensor> outputs = model({memplan::Tensor::of({2, 8}, tokens)});
//
// It stands on libtorch's small C interface (the functions named aoti_torch_*) and on nothing else of it: no header of
// torch is included. Link with -ltorch_cpu -ltorch -lc10. Every byte that is used is checked against the digests in the
// file before any code of it is loaded; errors are std::runtime_error.
#pragma once
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
struct AtenTensorOpaque;
typedef AtenTensorOpaque* AtenTensorHandle;
int32_t aoti_torch_create_tensor_from_blob(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t,
                                           int32_t, AtenTensorHandle*);
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle);
int32_t aoti_torch_new_tensor_handle(AtenTensorHandle, AtenTensorHandle*);
int32_t aoti_torch_get_data_ptr(AtenTensorHandle, void**);
int32_t aoti_torch_get_dim(AtenTensorHandle, int64_t*);
int32_t aoti_torch_get_sizes(AtenTensorHandle, int64_t**);
int32_t aoti_torch_get_strides(AtenTensorHandle, int64_t**);
int32_t aoti_torch_get_dtype(AtenTensorHandle, int32_t*);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_int64();
size_t aoti_torch_dtype_element_size(int32_t);
void aoti_torch_grad_mode_set_enabled(bool);
}

namespace memplan {

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error("memplan: " + text); }

// -- tensors ------------------------------------------------------------------------------------------------------------

// A tensor of libtorch, counted: copies are the same memory.
class Tensor {
   public:
    Tensor() = default;
    explicit Tensor(AtenTensorHandle owned) : held_(owned, [](AtenTensorHandle h) { aoti_torch_delete_tensor_object(h); }) {}

    // Over memory of the caller's, which has to outlive it; contiguous where no strides are given.
    static Tensor over(void* data, int32_t dtype, const std::vector<int64_t>& sizes, std::vector<int64_t> strides = {}) {
        if (strides.empty()) {
            strides.assign(sizes.size(), 1);
            for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * (sizes[k] > 1 ? sizes[k] : 1);
        }
        AtenTensorHandle made = nullptr;
        const int32_t cpu = aoti_torch_device_type_cpu();
        if (aoti_torch_create_tensor_from_blob(data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype, cpu, -1, &made))
            fail("a tensor cannot be made");
        return Tensor(made);
    }
    static Tensor of(const std::vector<int64_t>& sizes, std::vector<float>& data) {
        return over(data.data(), aoti_torch_dtype_float32(), sizes);
    }
    static Tensor of(const std::vector<int64_t>& sizes, std::vector<int64_t>& data) {
        return over(data.data(), aoti_torch_dtype_int64(), sizes);
    }

    AtenTensorHandle handle() const { return held_.get(); }
    std::vector<int64_t> sizes() const { return read(aoti_torch_get_sizes); }
    std::vector<int64_t> strides() const { return read(aoti_torch_get_strides); }
    int32_t dtype() const {
        int32_t found = 0;
        aoti_torch_get_dtype(handle(), &found);
        return found;
    }
    // Bytes of an element.
    size_t item_bytes() const { return aoti_torch_dtype_element_size(dtype()); }
    // The first element; elements lie as `strides` tells.
    template <class T> const T* data() const {
        void* found = nullptr;
        aoti_torch_get_data_ptr(handle(), &found);
        return static_cast<const T*>(found);
    }

   private:
    std::vector<int64_t> read(int32_t (*get)(AtenTensorHandle, int64_t**)) const {
        int64_t dim = 0, *found = nullptr;
        if (aoti_torch_get_dim(handle(), &dim) || get(handle(), &found)) fail("a tensor cannot be read");
        return {found, found + dim};
    }
    std::shared_ptr<AtenTensorOpaque> held_;
};

// -- the file -----------------------------------------------------------------------------------------------------------

// SHA-256 (FIPS 180-4), as hexadecimal digits.
inline std::string sha256(const uint8_t* data, size_t size) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
        0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
        0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
        0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
        0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
        0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    auto turn = [](uint32_t x, int n) { return x >> n | x << (32 - n); };
    auto block = [&](const uint8_t* p) {
        uint32_t w[64], v[8];
        for (int i = 0; i < 16; ++i) w[i] = uint32_t(p[4 * i]) << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
        for (int i = 16; i < 64; ++i)
            w[i] = w[i - 16] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
                   (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
        std::memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; ++i) {
            const uint32_t a = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            const uint32_t b = (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            std::memmove(v + 1, v, 7 * sizeof *v);
            v[4] += a, v[0] = a + b;
        }
        for (int i = 0; i < 8; ++i) h[i] += v[i];
    };
    size_t done = 0;
    for (; done + 64 <= size; done += 64) block(data + done);
    uint8_t last[128] = {};
    const size_t rest = size - done, total = rest < 56 ? 64 : 128;
    if (rest) std::memcpy(last, data + done, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; ++i) last[total - 1 - i] = uint8_t(uint64_t(size) * 8 >> (8 * i));
    for (size_t i = 0; i < total; i += 64) block(last + i);
    std::string out;
    for (uint32_t word : h)
        for (int i = 28; i >= 0; i -= 4) out += "0123456789abcdef"[word >> i & 15];
    return out;
}

// The file, mapped: weights are used where they lie, and what the model changes stays in this process.
class Package {
   public:
    explicit Package(const std::string& path) : path_(path) {
        const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (file < 0) fail("there is no file " + path);
        size_ = size_t(lseek(file, 0, SEEK_END));
        void* found = size_ ? mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0) : MAP_FAILED;
        close(file);
        if (found == MAP_FAILED) fail(path + " cannot be read");
        bytes_ = static_cast<uint8_t*>(found);
        try {
            list();
            const std::string manifest = text("manifest.json");
            if (sha256(reinterpret_cast<const uint8_t*>(manifest.data()), manifest.size()) != text("manifest.sha256")) damaged("its manifest");
            read_digests(manifest);
        } catch (...) {
            munmap(bytes_, size_);
            throw;
        }
    }
    ~Package() { munmap(bytes_, size_); }
    Package(const Package&) = delete;
    Package& operator=(const Package&) = delete;

    bool has(const std::string& name) const { return places_.count(name) != 0; }
    // The bytes of an entry, checked.
    std::pair<uint8_t*, size_t> entry(const std::string& name) const {
        auto place = places_.find(name);
        auto digest = digests_.find(name);
        if (place == places_.end() || digest == digests_.end()) damaged(name);
        uint8_t* start = bytes_ + place->second.first;
        if (sha256(start, place->second.second) != digest->second) damaged(name);
        return {start, place->second.second};
    }
    [[noreturn]] void damaged(const std::string& what) const { fail(path_ + " is no saved model, or it is damaged: " + what); }

   private:
    uint64_t number(size_t at, int bytes) const {
        if (at + bytes > size_) damaged("it ends early");
        uint64_t out = 0;
        for (int i = bytes; i-- > 0;) out = out << 8 | bytes_[at + i];
        return out;
    }
    void list() {  // the directory at the end of a zip
        size_t end = size_;
        for (size_t k = 22; k <= size_ && k < 22 + 65536; ++k)
            if (number(size_ - k, 4) == 0x06054b50) {
                end = size_ - k;
                break;
            }
        if (end == size_) damaged("it has no directory");
        size_t at = number(end + 16, 4);
        for (uint64_t left = number(end + 10, 2); left > 0; --left) {
            if (number(at, 4) != 0x02014b50 || number(at + 10, 2) != 0) damaged("its directory");
            const uint64_t size = number(at + 24, 4), names = number(at + 28, 2), local = number(at + 42, 4);
            if (size == 0xffffffff || local == 0xffffffff) fail("files of 4 GiB and more are not read by this example");
            if (at + 46 + names > size_) damaged("its directory");
            const std::string name(reinterpret_cast<char*>(bytes_ + at + 46), names);
            const uint64_t start = local + 30 + number(local + 26, 2) + number(local + 28, 2);
            if (start + size > size_) damaged(name);
            places_[name] = {start, size};
            at += 46 + names + number(at + 30, 2) + number(at + 32, 2);
        }
    }
    std::string text(const std::string& name) const {
        auto place = places_.find(name);
        if (place == places_.end()) damaged(name);
        return {reinterpret_cast<char*>(bytes_ + place->second.first), place->second.second};
    }
    void read_digests(const std::string& manifest) {  // "name": {"bytes": 1, "sha256": "..."}, as memplan prints it
        if (manifest.find("\"format\": \"memplan model\"") == std::string::npos || manifest.find("\"version\": 1\n") == std::string::npos)
            fail(path_ + " is of another version of the format");
        for (auto& [name, place] : places_) {
            size_t at = manifest.find("\"" + name + "\": {");
            if (at == std::string::npos) continue;
            at = manifest.find("\"sha256\": \"", at);
            if (at != std::string::npos) digests_[name] = manifest.substr(at + 11, 64);
        }
    }
    std::string path_;
    uint8_t* bytes_ = nullptr;
    size_t size_ = 0;
    std::map<std::string, std::pair<size_t, size_t>> places_;
    std::map<std::string, std::string> digests_;
};

// -- what a wrapper knows of whoever calls it (codegen/cpp_wrapper_prelude.h) ----------------------------------------------

struct Call;
struct Host {
    int32_t (*python)(Call*, int32_t, const AtenTensorHandle*, int32_t, const int64_t*, int32_t, const int32_t*, int32_t,
                      AtenTensorHandle*, int32_t, int64_t*, int32_t);
    void (*release)(Call*, int32_t);
};
struct Kernel {
    void* function;
    int64_t threads, shared, grid, blocks[3];
    void* context;
};
struct Import {
    const char* name;
    void** slot;
};
struct Call {
    const Host* host;
    const Kernel* kernels;
    const AtenTensorHandle* constants;
    AtenTensorHandle* inputs;
    const int64_t* numbers;
    AtenTensorHandle* outputs;
    int64_t* numbers_out;
    const char* failed;
    const char* reason;
    int32_t step;
    std::string said;  // what the host was told
    const std::set<int32_t>* checks;
};

// -- the model ----------------------------------------------------------------------------------------------------------

class Model {
   public:
    explicit Model(const std::string& path) : package_(path) {
        if (!package_.has("cpp.txt")) fail(path + " needs Python: it was saved for a GPU, or calls what C++ cannot");
        auto [text, size] = package_.entry("cpp.txt");
        std::istringstream lines(std::string(reinterpret_cast<char*>(text), size));
        std::string line;
        while (std::getline(lines, line)) read(line);
        // all that is used has been checked by now: code comes last
        if (package_.has("kernels.so")) library_ = load("kernels.so");
        wrapper_ = load("wrapper.so");
        for (const std::string& name : kernel_names_) {
            void* found = library_ ? dlsym(library_, name.c_str()) : nullptr;
            if (!found) fail("there is no kernel " + name);
            kernels_.push_back(Kernel{found, 0, 0, 0, {0, 0, 0}, nullptr});
        }
        auto* imports = static_cast<Import*>(dlsym(wrapper_, "memplan_imports"));
        auto* count = static_cast<int32_t*>(dlsym(wrapper_, "memplan_import_count"));
        run_ = reinterpret_cast<int32_t (*)(Call*)>(dlsym(wrapper_, "memplan_run"));
        if (!imports || !count || !run_) fail("the wrapper is not one of memplan's");
        for (int32_t k = 0; k < *count; ++k)
            if (!(*imports[k].slot = dlsym(RTLD_DEFAULT, imports[k].name))) fail(std::string("libtorch has no ") + imports[k].name);
    }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    // The flat inputs of the exported model in, its flat tensors out (what is no tensor is left out).
    std::vector<Tensor> operator()(const std::vector<Tensor>& given) const {
        if (given.size() != inputs_.size()) fail("the model takes " + std::to_string(inputs_.size()) + " tensors");
        for (size_t k = 0; k < given.size(); ++k) check(k, given[k]);
        const size_t n = arguments_.size();
        std::vector<AtenTensorHandle> handles(n, nullptr), outputs(tensors_out_, nullptr), constants;
        std::vector<int64_t> numbers(n, 0), numbers_out(numbers_out_, 0);
        for (const Tensor& t : constants_) constants.push_back(t.handle());
        for (size_t k = 0; k < n; ++k) {
            const Argument& a = arguments_[k];
            if (a.kind == 's') numbers[k] = (given[a.number].sizes()[a.dim] - a.offset) / a.factor;
            if (a.kind == 'w') aoti_torch_new_tensor_handle(weights_[a.number].handle(), &handles[k]);
            if (a.kind == 'i') aoti_torch_new_tensor_handle(given[a.number].handle(), &handles[k]);
        }
        static const Host host = {refuse, release};
        aoti_torch_grad_mode_set_enabled(false);
        Call call{&host, kernels_.data(), constants.data(), handles.data(), numbers.data(), outputs.data(), numbers_out.data(), nullptr, nullptr, 0, {}, &checks_};
        const int32_t status = run_(&call);
        for (AtenTensorHandle h : handles)
            if (h) aoti_torch_delete_tensor_object(h);
        std::vector<Tensor> out;
        for (AtenTensorHandle h : outputs)
            if (h) out.emplace_back(h);
        if (status) fail(!call.said.empty() ? call.said : std::string("a step failed in ") + (call.failed ? call.failed : "the wrapper"));
        return out;
    }

    size_t input_count() const { return inputs_.size(); }

   private:
    struct Argument {
        char kind;  // s: size, w: weight, i: input
        size_t number, dim;
        int64_t factor, offset;
    };
    struct Input {
        int32_t dtype;
        std::vector<int64_t> sizes;  // -1: any
    };

    void read(const std::string& line) {  // memplan/saving_cpp.py writes them
        std::istringstream in(line);
        std::string word, name;
        in >> word;
        auto shape = [&] {
            size_t dim = 0;
            in >> dim;
            std::vector<int64_t> out(dim);
            for (int64_t& v : out) in >> v;
            return out;
        };
        if (word == "input") {
            Input i;
            in >> i.dtype;
            i.sizes = shape();
            inputs_.push_back(i);
        } else if (word == "weight" || word == "constant") {
            int32_t dtype = 0;
            int64_t offset = 0;
            in >> name >> dtype >> offset;
            const std::vector<int64_t> sizes = shape(), strides = shape();
            (word == "weight" ? weights_ : constants_).push_back(Tensor::over(memory(name) + offset, dtype, sizes, strides));
        } else if (word == "argument") {
            Argument a{};
            in >> a.kind >> a.number;
            if (a.kind == 's') in >> a.dim >> a.factor >> a.offset;
            arguments_.push_back(a);
        } else if (word == "kernel") {
            in >> name;
            kernel_names_.push_back(name);
        } else if (word == "check") {
            int32_t number = 0;
            in >> number;
            checks_.insert(number);
        } else if (word == "outputs") {
            in >> tensors_out_ >> numbers_out_;
        } else {
            fail("the model's description has a line that this program does not know: " + line);
        }
        if (in.fail()) package_.damaged("cpp.txt");
    }
    uint8_t* memory(const std::string& name) {  // each is checked once
        auto found = memories_.find(name);
        if (found == memories_.end()) found = memories_.emplace(name, package_.entry(name).first).first;
        return found->second;
    }
    void check(size_t k, const Tensor& t) const {
        const Input& wanted = inputs_[k];
        const std::vector<int64_t> sizes = t.sizes(), strides = t.strides();
        bool good = t.dtype() == wanted.dtype && sizes.size() == wanted.sizes.size();
        int64_t stride = 1;
        for (size_t d = sizes.size(); good && d-- > 0; stride *= sizes[d])
            good = (wanted.sizes[d] < 0 || sizes[d] == wanted.sizes[d]) && (sizes[d] == 1 || strides[d] == stride);
        if (!good) fail("input " + std::to_string(k) + " is not of the dtype and sizes that the model was exported for, or not contiguous");
    }
    void* load(const std::string& name) const {  // by a file of this user's alone, gone when it is loaded
        auto [data, size] = package_.entry(name);
        const char* folder = std::getenv("TMPDIR");
        std::string path = std::string(folder ? folder : "/tmp") + "/memplan-XXXXXX";
        const int file = mkstemp(path.data());
        if (file < 0) fail("no file can be made in " + path);
        bool good = true;
        for (size_t done = 0; good && done < size;) {
            const ssize_t count = write(file, data + done, size - done);
            good = count > 0;
            done += good ? size_t(count) : 0;
        }
        close(file);
        void* found = good ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
        const char* text = found || !good ? "the disk is full" : dlerror();
        unlink(path.c_str());
        if (!found) fail(name + " cannot be loaded here: " + (text ? text : ""));
        return found;
    }
    // The wrappers that are saved for C++ ask for Python only to say what is wrong.
    static int32_t refuse(Call* call, int32_t line, const AtenTensorHandle*, int32_t, const int64_t* numbers, int32_t count,
                          const int32_t*, int32_t, AtenTensorHandle*, int32_t, int64_t*, int32_t) {
        if (call->checks->count(line) && count == 1) call->said = reinterpret_cast<const char*>(numbers[0]);
        else if (!line) call->said = "memory ran out in step " + std::to_string(call->step);
        else call->said = "a call of libtorch failed, or gave another layout, in step " + std::to_string(call->step);
        return 1;
    }
    static void release(Call* call, int32_t input) {
        if (call->inputs[input]) aoti_torch_delete_tensor_object(call->inputs[input]);
        call->inputs[input] = nullptr;
    }

    Package package_;
    std::vector<Input> inputs_;
    std::vector<Argument> arguments_;
    std::vector<Tensor> weights_, constants_;
    std::vector<std::string> kernel_names_;
    std::vector<Kernel> kernels_;
    std::map<std::string, uint8_t*> memories_;
    std::set<int32_t> checks_;  // lines of Python that say what is wrong
    size_t tensors_out_ = 0, numbers_out_ = 0;
    void *library_ = nullptr, *wrapper_ = nullptr;
    int32_t (*run_)(Call*) = nullptr;
};

}  // namespace memplan
