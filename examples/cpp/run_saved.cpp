// Runs a saved model on tensors from files:
//
//     run_saved MODEL TYPE:SIZES:FILE... OUTPUT_PREFIX
//     run_saved model.memplan i64:2x8:tokens.bin f32:16:scale.bin out
//
// TYPE is f32 or i64, SIZES are joined by x, FILE holds the elements. Each output is written to PREFIX0.bin, PREFIX1.bin,
// ... in its own dtype, and its sizes are printed. Build (TORCH is `python -c "import torch; print(torch.__path__[0])"`):
//
//     g++ -std=c++17 -O2 run_saved.cpp -o run_saved -L$TORCH/lib -Wl,-rpath,$TORCH/lib -ltorch_cpu -ltorch -lc10 -ldl
#include "memplan_model.h"

#include <iostream>

template <class T> static std::vector<T> elements(const std::string& path, int64_t count) {
    std::vector<T> out(static_cast<size_t>(count));
    std::ifstream file(path, std::ios::binary);
    if (!file.read(reinterpret_cast<char*>(out.data()), std::streamsize(out.size() * sizeof(T)))) memplan::fail(path + " is too short");
    return out;
}

static int run(int count, char** words) {
    memplan::Model model(words[1]);
    std::vector<std::vector<float>> floats;
    std::vector<std::vector<int64_t>> integers;
    std::vector<memplan::Tensor> inputs;
    floats.reserve(size_t(count)), integers.reserve(size_t(count));  // tensors are made over them
    for (int k = 2; k < count - 1; ++k) {
        std::istringstream word(words[k]);
        std::string type, shape, path, size;
        std::getline(word, type, ':'), std::getline(word, shape, ':'), std::getline(word, path);
        std::vector<int64_t> sizes;
        int64_t total = 1;
        for (std::istringstream parts(shape); std::getline(parts, size, 'x');) total *= sizes.emplace_back(std::stoll(size));
        if (type == "f32") inputs.push_back(memplan::Tensor::of(sizes, floats.emplace_back(elements<float>(path, total))));
        else if (type == "i64") inputs.push_back(memplan::Tensor::of(sizes, integers.emplace_back(elements<int64_t>(path, total))));
        else memplan::fail("a type is f32 or i64, not " + type);
    }
    const std::vector<memplan::Tensor> outputs = model(inputs);
    for (size_t k = 0; k < outputs.size(); ++k) {
        const std::vector<int64_t> sizes = outputs[k].sizes(), strides = outputs[k].strides();
        int64_t total = 1;
        std::cout << "output " << k << ":";
        for (int64_t n : sizes) std::cout << " " << n, total *= n;
        std::cout << "\n";
        const size_t item = outputs[k].item_bytes();
        std::ofstream file(words[count - 1] + std::to_string(k) + ".bin", std::ios::binary);
        for (int64_t i = 0; i < total; ++i) {
            int64_t rest = i, at = 0;
            for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) at += rest % sizes[d] * strides[d];
            file.write(outputs[k].data<char>() + size_t(at) * item, std::streamsize(item));
        }
    }
    return 0;
}

int main(int count, char** words) {
    if (count < 3) {
        std::cerr << "usage: run_saved MODEL TYPE:SIZES:FILE... OUTPUT_PREFIX\n";
        return 2;
    }
    try {
        return run(count, words);
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
