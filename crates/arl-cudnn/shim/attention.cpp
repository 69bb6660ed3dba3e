// See attention.h. Knows cudnn-frontend, and nothing of who calls.

#include "attention.h"

#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <cudnn_frontend.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

namespace cudnn_frontend {
// The frontend looks up all of cuDNN's functions in this library.
void *cudnn_dlhandle = nullptr;
}  // namespace cudnn_frontend

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

struct arl_cudnn {
    cudnnHandle_t handle = nullptr;
    std::shared_ptr<fe::DeviceProperties const> properties;
};

struct arl_attention {
    fe::graph::Graph graph;
};

namespace {

// The operands' names within a graph, in the order of `arl_attention_operands`; those of their offsets follow.
enum Uid : int64_t { Q = 1, K, V, OUT, STATS, D_OUT, D_Q, D_K, D_V, LENGTHS, OFFSETS };

void say(char *message, int64_t size, std::string const &text) {
    if (size > 0) {
        auto const length = std::min<size_t>(text.size(), static_cast<size_t>(size) - 1);
        std::memcpy(message, text.data(), length);
        message[length] = 0;
    }
}

void *pointer(uint64_t address) { return reinterpret_cast<void *>(address); }

// Runs `body`, which gives an error's text or an empty one; false: `message` holds the text.
template <typename Body>
bool guarded(char *message, int64_t size, Body body) {
    std::string text;
    try {
        text = body();
    } catch (std::exception const &error) {
        text = std::string(error.what()) + " (thrown)";
    } catch (...) {
        text = "something unknown was thrown";
    }
    if (!text.empty()) {
        say(message, size, text);
    }
    return text.empty();
}

// An error's text, empty where there is none.
std::string text_of(fe::error_t error) {
    if (error.is_good()) {
        return {};
    }
    auto const text = error.get_message();
    return text.empty() ? "an error without a text" : text;
}

std::string text_of(cudnnStatus_t status, char const *what) {
    return status == CUDNN_STATUS_SUCCESS ? std::string{} : std::string(what) + ": " + fe::detail::get_error_string(status);
}

// Makes the graph's tensors for a shape.
class Builder {
   public:
    Builder(fe::graph::Graph &graph, arl_attention_shape const &shape) : graph_(graph), shape_(shape) {
        type_ = shape.type == 0 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
        lengths_ = graph.tensor(index("lengths", LENGTHS, shape.sequences, fe::DataType_t::INT32));
    }

    // The lengths of the sequences, of queries and of keys alike.
    Tensor lengths() const { return lengths_; }

    // What is read: `heads` of `dim` elements a token.
    Tensor input(char const *name, Uid uid, int64_t heads, int64_t stride) {
        auto tensor = graph_.tensor(fe::graph::Tensor_attributes().set_name(name));
        place(tensor, uid, heads, shape_.dim, stride, shape_.dim, type_);
        return tensor;
    }

    // What is written.
    void output(Tensor tensor, Uid uid, int64_t heads, int64_t stride) {
        place(tensor, uid, heads, shape_.dim, stride, shape_.dim, type_);
        tensor->set_output(true);
    }

    // The statistics `[tokens, query_heads]`, read or written.
    void stats(Tensor tensor) {
        place(tensor, STATS, shape_.query_heads, 1, shape_.query_heads, 1, fe::DataType_t::FLOAT);
    }

   private:
    static fe::graph::Tensor_attributes index(std::string const &name, int64_t uid, int64_t count, fe::DataType_t type) {
        return fe::graph::Tensor_attributes()
            .set_name(name)
            .set_uid(uid)
            .set_dim({count, 1, 1, 1})
            .set_stride({1, 1, 1, 1})
            .set_data_type(type);
    }

    void place(Tensor tensor, Uid uid, int64_t heads, int64_t dim, int64_t token_stride, int64_t head_stride,
               fe::DataType_t type) {
        auto const offsets_name = std::string(tensor->get_name()) + " offsets";
        tensor->set_uid(uid)
            .set_dim({shape_.sequences, heads, shape_.max_len, dim})
            // Where a sequence begins, the offsets say; the first stride is that of sequences without gaps.
            .set_stride({shape_.max_len * token_stride, head_stride, token_stride, 1})
            .set_data_type(type)
            .set_ragged_offset(graph_.tensor(index(offsets_name, OFFSETS + uid, shape_.sequences + 1, fe::DataType_t::INT32)));
    }

    fe::graph::Graph &graph_;
    arl_attention_shape const &shape_;
    fe::DataType_t type_;
    Tensor lengths_;
};

// What both passes' attributes have in common: causal, within the sequences, perhaps within a window.
template <typename Attributes>
Attributes attributes(char const *name, arl_attention_shape const &shape, Tensor const &lengths) {
    auto result = Attributes()
                      .set_name(name)
                      .set_attn_scale(shape.scale)
                      .set_padding_mask(true)
                      .set_seq_len_q(lengths)
                      .set_seq_len_kv(lengths)
                      .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                      .set_diagonal_band_right_bound(0);
    if (shape.window > 0 && shape.window < shape.max_len) {
        result.set_diagonal_band_left_bound(static_cast<int>(shape.window));
    }
    return result;
}

void forward(fe::graph::Graph &graph, arl_attention_shape const &s) {
    Builder build(graph, s);
    auto q = build.input("q", Q, s.query_heads, s.q_stride);
    auto k = build.input("k", K, s.key_value_heads, s.k_stride);
    auto v = build.input("v", V, s.key_value_heads, s.v_stride);
    auto options = attributes<fe::graph::SDPA_attributes>("attention", s, build.lengths()).set_generate_stats(true);
    auto [out, stats] = graph.sdpa(q, k, v, options);
    build.output(out, OUT, s.query_heads, s.out_stride);
    build.stats(stats);
    stats->set_output(true);
}

void backward(fe::graph::Graph &graph, arl_attention_shape const &s) {
    if (s.deterministic != 0) {
        // The frontend knows no other way to ask for the pass whose workspace is linear in the tokens (from cuDNN 9.25 on, on
        // 9.0); else it takes the one that keeps all scores.
        setenv("CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT", "0", 0);
    }
    Builder build(graph, s);
    auto q = build.input("q", Q, s.query_heads, s.q_stride);
    auto k = build.input("k", K, s.key_value_heads, s.k_stride);
    auto v = build.input("v", V, s.key_value_heads, s.v_stride);
    auto out = build.input("out", OUT, s.query_heads, s.out_stride);
    auto d_out = build.input("d_out", D_OUT, s.query_heads, s.d_out_stride);
    auto stats = graph.tensor(fe::graph::Tensor_attributes().set_name("stats"));
    build.stats(stats);
    // Without the number of tokens, the workspace would hold `sequences * max_len` of them.
    auto options = attributes<fe::graph::SDPA_backward_attributes>("attention_backward", s, build.lengths())
                       .set_max_total_seq_len_q(s.tokens)
                       .set_max_total_seq_len_kv(s.tokens)
                       .set_deterministic_algorithm(s.deterministic != 0);
    auto [d_q, d_k, d_v] = graph.sdpa_backward(q, k, v, out, d_out, stats, options);
    build.output(d_q, D_Q, s.query_heads, s.d_q_stride);
    build.output(d_k, D_K, s.key_value_heads, s.d_k_stride);
    build.output(d_v, D_V, s.key_value_heads, s.d_v_stride);
}

// From the description of a graph to a plan; the text of what failed.
std::string plan(arl_cudnn const &cudnn, fe::graph::Graph &graph) {
    auto error = graph.validate();
    if (error.is_good()) error = graph.build_operation_graph(cudnn.handle);
    if (error.is_good()) error = graph.create_execution_plans({fe::HeurMode_t::A});
    if (error.is_good()) error = graph.check_support();
    if (error.is_good()) error = graph.build_plans(fe::BuildPlanPolicy_t::HEURISTICS_CHOICE);
    return text_of(error);
}

}  // namespace

extern "C" {

int64_t arl_cudnn_open(char const *path, char *message, int64_t size) {
    int64_t version = 0;
    guarded(message, size, [&]() -> std::string {
        if (fe::cudnn_dlhandle == nullptr) {
            fe::cudnn_dlhandle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
        }
        if (fe::cudnn_dlhandle == nullptr) {
            auto const why = dlerror();
            return why == nullptr ? "it does not open" : why;
        }
        // Builds for all versions of CUDA have one name; one for another than this library was compiled with asks for
        // libraries that are not there.
        auto const built_for = reinterpret_cast<size_t (*)()>(dlsym(fe::cudnn_dlhandle, "cudnnGetCudartVersion"));
        if (built_for == nullptr || built_for() / 1000 != CUDART_VERSION / 1000) {
            return "it is not built for CUDA " + std::to_string(CUDART_VERSION / 1000);
        }
        version = static_cast<int64_t>(fe::detail::get_backend_version());
        return {};
    });
    return version;
}

arl_cudnn *arl_cudnn_create(char const *properties, char *message, int64_t size) {
    auto cudnn = std::unique_ptr<arl_cudnn>(new (std::nothrow) arl_cudnn);
    auto const made = guarded(message, size, [&]() -> std::string {
        if (cudnn == nullptr) {
            return "out of memory";
        }
        if (properties == nullptr) {
            return text_of(fe::detail::create_handle(&cudnn->handle), "cudnnCreate");
        }
        auto device = std::make_shared<fe::DeviceProperties>();
        // The end of the text is part of it.
        auto const error = device->deserialize({properties, properties + std::strlen(properties) + 1});
        cudnn->properties = device;
        return text_of(error);
    });
    return made ? cudnn.release() : nullptr;
}

void arl_cudnn_destroy(arl_cudnn *cudnn) {
    if (cudnn != nullptr && cudnn->handle != nullptr) {
        // No caller is left to report a failure to.
        guarded(nullptr, 0, [&]() -> std::string { return text_of(fe::detail::destroy_handle(cudnn->handle), ""); });
    }
    delete cudnn;
}

arl_attention *arl_attention_create(arl_cudnn *cudnn, arl_attention_shape const *shape, int64_t *workspace, char *message,
                                    int64_t size) {
    std::unique_ptr<arl_attention> attention;
    auto const made = guarded(message, size, [&]() -> std::string {
        attention = std::make_unique<arl_attention>();
        auto &graph = attention->graph;
        graph.set_io_data_type(shape->type == 0 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF)
            .set_intermediate_data_type(fe::DataType_t::FLOAT)
            .set_compute_data_type(fe::DataType_t::FLOAT)
            .set_sm_version(shape->capability);
        if (cudnn->properties != nullptr) {
            graph.set_device_properties(cudnn->properties);
        }
        shape->backward != 0 ? backward(graph, *shape) : forward(graph, *shape);
        auto const failed = plan(*cudnn, graph);
        return failed.empty() ? text_of(graph.get_workspace_size(*workspace)) : failed;
    });
    return made ? attention.release() : nullptr;
}

void arl_attention_destroy(arl_attention *attention) { delete attention; }

int32_t arl_attention_run(arl_cudnn *cudnn, arl_attention *attention, arl_attention_operands const *o,
                          uint64_t workspace, void *stream, char *message, int64_t size) {
    auto const queued = guarded(message, size, [&]() -> std::string {
        if (cudnn->handle == nullptr) {
            return "a plan for a device that is not there";
        }
        auto const chosen = text_of(fe::detail::set_stream(cudnn->handle, static_cast<cudaStream_t>(stream)), "the stream");
        if (!chosen.empty()) {
            return chosen;
        }
        uint64_t const addresses[] = {o->q, o->k, o->v, o->out, o->stats, o->d_out, o->d_q, o->d_k, o->d_v, o->lengths};
        std::unordered_map<int64_t, void *> operands;
        for (int64_t uid = Q; uid <= LENGTHS; uid++) {
            if (addresses[uid - Q] != 0) operands.emplace(uid, pointer(addresses[uid - Q]));
        }
        for (int64_t uid = Q; uid <= D_V; uid++) {
            if (o->offsets[uid - Q] != 0) operands.emplace(OFFSETS + uid, pointer(o->offsets[uid - Q]));
        }
        return text_of(attention->graph.execute(cudnn->handle, operands, pointer(workspace)));
    });
    return queued ? 0 : 1;
}
}
