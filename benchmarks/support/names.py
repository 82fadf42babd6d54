"""Which models the support matrix holds."""

# Of each module file of timm: the smallest of each kind of model that it builds. Kinds that differ
# in sizes, training or weights alone are left out, and most of the purely convolutional ones, which
# come last, the large ones after the small.
TIMM = """
beit: beit_base_patch16_224 beitv2_base_patch16_224
cait: cait_xxs24_224 cait_xs24_384
coat: coat_lite_tiny coat_tiny
convit: convit_tiny
convnext: test_convnext convnext_atto convnext_atto_ols convnext_atto_rms convnext_large_mlp
 convnext_tiny_hnf convnextv2_atto
crossvit: crossvit_tiny_240 crossvit_9_dagger_240
davit: davit_tiny davit_base_fl
deepseek_vit: deepseek_vit_412m deepseek_vit_412m_align deepseek_vit_412m_enc
deit: deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
edgenext: edgenext_xx_small edgenext_small_rw
efficientformer: efficientformer_l1
efficientvit_msra: efficientvit_m0
eva: eva02_tiny_patch14_224 eva02_base_patch16_clip_224 vit_small_patch16_dinov3
 vit_tiny_patch16_dinov3_qkvb vit_base_patch16_sapiens2 vit_small_patch16_lingbot
 vit_small_patch16_rope_224 vit_small_patch16_rope_mixed_ape_224
 vit_mediumd_patch16_rope_reg1_gap_256 vit_pe_core_tiny_patch16_384 vit_pe_lang_large_patch14_448
 vit_pe_spatial_tiny_patch16_512
focalnet: focalnet_tiny_lrf focalnet_tiny_srf focalnet_large_fl3
gcvit: gcvit_xxtiny
gemma4_vit: gemma4_vit_167m gemma4_vit_167m_enc
hiera: hiera_tiny_224 hiera_small_abswin_256
hieradet_sam2: hieradet_small sam2_hiera_tiny
iformer: iformer_t iformer_m_distilled
inception_next: inception_next_atto
levit: levit_128s levit_conv_128s
mambaout: test_mambaout mambaout_femto mambaout_small_rw mambaout_base_wide_rw
maxxvit: test_coatnet coatnet_pico_rw_224 coatnet_bn_0_rw_224 coatnet_nano_cc_224
 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224 test_maxvit maxvit_pico_rw_256
 maxvit_rmlp_pico_rw_256 maxvit_tiny_tf_224 maxvit_tiny_pm_256 maxxvit_rmlp_nano_rw_256
 maxxvitv2_nano_rw_256
metaformer: caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12
mlp_mixer: gmixer_12_224 gmlp_s16_224 mixer_s32_224 resmlp_12_224
mobilevit: mobilevit_xxs mobilevitv2_050
mvitv2: mvitv2_tiny mvitv2_small_cls
naflexvit: naflexvit_base_patch16_gap naflexvit_base_patch16_map naflexvit_base_patch16_par_gap
 naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_siglip naflexvit_base_patch16_radio_v3
nest: nest_tiny nest_tiny_jx
pit: pit_ti_224 pit_ti_distilled_224
pvt_v2: pvt_v2_b0 pvt_v2_b2_li
qwen3_vit: qwen3_vit_88m qwen3_vit_88m_enc qwen3_vit_88m_merge
sequencer: sequencer2d_s
swiftformer: swiftformer_xs
swin_transformer: swin_tiny_patch4_window7_224 swin_s3_tiny_224
swin_transformer_v2: swinv2_tiny_window8_256 swinv2_base_window12to16_192to256
swin_transformer_v2_cr: swinv2_cr_tiny_224 swinv2_cr_tiny_ns_224
tiny_vit: tiny_vit_5m_224
tnt: tnt_s_patch16_224 tnt_s_legacy_patch16_224
twins: twins_pcpvt_small twins_svt_small
visformer: visformer_tiny
vision_transformer: test_vit vit_tiny_patch16_224 aimv2_large_patch14_224 beit3_base_patch16_224
 eva_large_patch14_196 flexivit_small vit_base_patch16_224_miil vit_base_patch16_clip_quickgelu_224
 vit_base_patch16_rpn_224 vit_base_patch16_siglip_224 vit_base_patch16_siglip_gap_224
 vit_base_patch16_xp_224 vit_dlittle_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256
 vit_dwee_patch16_reg1_gap_256 vit_intern300m_patch14_448 vit_little_patch16_reg1_gap_256
 vit_medium_patch16_clip_224 vit_medium_patch16_gap_240 vit_pwee_patch16_reg1_gap_256
 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_so150m_patch16_reg4_map_256
 vit_base_patch16_radio_v3
vision_transformer_hybrid: vit_base_mci_224 vit_small_r26_s32_224 vit_small_resnet26d_224
 vit_tiny_r_s16_p8_224
vision_transformer_relpos: test_vit_relpos vit_relpos_medium_patch16_cls_224
 vit_relpos_base_patch16_clsgap_224 vit_relpos_small_patch16_rpn_224 vit_srelpos_small_patch16_224
vision_transformer_sam: samvit_base_patch16
vitamin: vitamin_small_224 vitamin_large2_224
volo: volo_d1_224
xcit: xcit_nano_12_p8_224
byobnet: bat_resnext26ts eca_resnet33ts gcresnet33ts gernet_s mobileone_s0 regnetz_c16
 regnetz_d8_evos repvgg_a0 resnet50_clip resnet50_mlp resnet51q seresnet33ts test_byobnet
convmixer: convmixer_768_32 convmixer_1024_20_ks9_p14
cspnet: cs3darknet_focus_s cs3darknet_s cs3se_edgenet_x cspresnet50 cspresnext50 sedarknet21
cspnext: cspnext_tiny
dla: dla34 dla60_res2net
efficientnet: test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos
 efficientnet_b0_gn efficientnet_cc_b0_4e efficientnet_lite0 efficientnetv2_rw_t
 gc_efficientnetv2_rw_t mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_035 tf_efficientnet_b0
 tinynet_e
fasternet: fasternet_t0
ghostnet: ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas: hardcorenas_a
hgnet: hgnet_tiny hgnetv2_b0
lcnetv2: lcnetv2_small
mobilenetv3: fbnetv3_b lcnet_035 mobilenetv3_small_050 mobilenetv4_conv_small
 mobilenetv4_hybrid_medium tf_mobilenetv3_small_minimal_100
regnet: regnetv_040 regnetx_002 regnety_002 regnety_040_sgn regnetz_005
repghost: repghostnet_050
repvit: repvit_m0_9
res2net: res2net50_26w_4s
resnest: resnest14d
resnet: test_resnet resnet18 resnet50_gn resnetblur18 ecaresnet26t resnext50_32x4d seresnet18
resnetv2: resnetv2_18 resnetv2_50d_evos resnetv2_50d_gn resnetv2_50x1_bit
rexnet: rexnet_100
selecsls: selecsls42
senet: legacy_seresnet18
sknet: skresnet18
starnet: starnet_s050
vovnet: eca_vovnet39b ese_vovnet19b_slim_dw vovnet39a
rdnet: rdnet_tiny
csatv2: csatv2
shvit: shvit_s1
efficientvit_mit: efficientvit_b0 efficientvit_l1
cpubone: cpubone_nano cpubone_b1_dwnorm
lowformer: lowformer_b0
efficientformer_v2: efficientformerv2_s0
efficientvim: efficientvim_m1 efficientvim_m1_dist
fastvit: fastvit_t8 fastvit_sa12 fastvit_mci0
nextvit: nextvit_small
densenet: densenet121 densenetblur121d
hrnet: hrnet_w18_small
dpn: dpn68
inception_v3: inception_v3
xception: legacy_xception
xception_aligned: xception41
inception_v4: inception_v4
inception_resnet_v2: inception_resnet_v2
tresnet: tresnet_m
mobilenetv5: mobilenetv5_base mobilenetv5_300m_enc
nfnet: test_nfnet dm_nfnet_f0 eca_nfnet_l0 nf_regnet_b0 nf_seresnet26
byoanet: botnet26t_256 halo2botnet50ts_256 halonet26t haloregnetz_b lambda_resnet26t
 sebotnet33ts_256
pnasnet: pnasnet5large
nasnet: nasnetalarge
vgg: vgg11 vgg11_bn
"""

# by model_type
TRANSFORMERS = """
encoders: albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2
 distilbert electra ernie esm eurobert flaubert fnet funnel ibert layoutlm lilt luke markuplm
 megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer rembert roberta
 roberta-prelayernorm roc_bert roformer splinter squeezebert tapas xlm xlm-roberta xlm-roberta-xl
 xlnet xmod yoso
decoders: biogpt bitnet bloom codegen cohere cohere2 cpmant ctrl deepseek_v2 deepseek_v3 diffllama
 falcon falcon_mamba gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss
 gptj granite granitemoe helium internlm3 jamba jetmoe lfm2 llama mamba mamba2 mistral mixtral
 modernbert-decoder mpt nemotron olmo olmo2 olmoe openai-gpt opt persimmon phi phi3 qwen2 qwen2_moe
 qwen3 qwen3_moe qwen3_next recurrent_gemma rwkv smollm3 stablelm starcoder2 xglm
seq2seq: bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 mvp
 nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 umt5
vision: beit convnext convnextv2 cvt data2vec-vision deit dinov2 dinov2_with_registers dinov3_vit
 focalnet glpn hiera ijepa imagegpt levit mobilenet_v2 mobilevit mobilevitv2 poolformer pvt pvt_v2
 regnet resnet segformer siglip_vision_model swiftformer swin swin2sr swinv2 vit vit_mae vit_msn
 vitdet yolos
audio: audio-spectrogram-transformer data2vec-audio hubert sew sew-d speech_to_text unispeech
 unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper
several: altclip blip chinese_clip clip flava groupvit siglip vilt
time: patchtsmixer patchtst
"""


def names() -> list[tuple[str, str, str]]:
    """Return (library, family, model) of every model of the matrix."""
    rows = []
    for library, text in (("timm", TIMM), ("transformers", TRANSFORMERS)):
        for line in text.replace("\n ", " ").strip().splitlines():
            family, _, models = line.partition(": ")
            rows += [(library, family, model) for model in models.split()]
    return rows
